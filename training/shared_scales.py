"""`column-shared`: one alpha for q, k and v, and one for gate and up, so that GGUF's Q1_0 holds the model exactly.

Q1_0 has one scale for an output row and 128 inputs, `column` one for each input. What moves it over are folds that
change nothing: an alpha that q, k and v share goes into the norm before them, gate's and up's into theirs; the alpha of
o_proj goes into the rows of v_proj, down's into the rows of up_proj (with grouped KV heads, if the query heads of a
group share it, so here they do). Each beta stays per matrix: GGUF has it as an adapter of rank 1.

On the disk this is an ordinary `column` checkpoint whose shared scales are equal bit for bit. In training they are one
parameter, whose gradient is the sum of the parts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .model import Attention, BinaryLinear, Llama, Mlp

# Stored alphas of o_proj and down_proj reach from this share of their largest upwards. Below it the folded value row
# would be lost in an fp16 KV cache, while its beta, divided by alpha, would grow; and 2^-10 of the largest is but twice
# what rounding that one to fp16 may change.
SMALLEST_SHARE = 2.0**-10
FOLDED_SCALES = ("o_proj.wscale", "down_proj.wscale")


@torch.no_grad()
def share_scales(model: Llama) -> None:
    """Tie the scales of a `column` model, starting from the closest model found without data.

    1. No alpha is negative: alpha · s = (-alpha) · (-s), so that latent column changes its sign.
    2. Scales of one group meet at one size: a factor moves from v into o, from up into down and from q into k, which
       changes no output.
    3. The shared alpha is the root of the mean square. The mean, which is the least-squares fit of the group's W_eff for
       inputs of unit covariance, loses more: 0.10 nats of held-out loss on the bundled model's student against 0.06
       (without step 2: 0.45). A fine-tune makes that good.

    Scales that are equal already stay what they are, bit for bit.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            q, k, v, o = (_binary(m) for m in (module.q_proj, module.k_proj, module.v_proj, module.o_proj))
            for linear in (q, k, v, o):
                _make_positive(linear)
            _move(q, k, _ratio(k, q) ** 0.5)
            _move(v, o, _ratio(q, v))
            _tie(q, k, v)
            heads, groups = module.config.num_attention_heads, module.config.num_key_value_heads
            if heads != groups:
                _tie_query_heads(o, groups, heads // groups)
        elif isinstance(module, Mlp):
            gate, up, down = (_binary(m) for m in (module.gate_proj, module.up_proj, module.down_proj))
            for linear in (gate, up, down):
                _make_positive(linear)
            _move(up, down, _ratio(gate, up))
            _tie(gate, up)
    model.shared_scales = True


def storable_scales(linear: BinaryLinear, wscale: Tensor) -> Tensor:
    """The `wscale` [1, K] of an o_proj or a down_proj (FOLDED_SCALES) as it is stored.

    They become the `d` of GGUF's blocks, which is fp16. Rounding them in the checkpoint instead of in the export makes
    both hold one model. It changes an alpha by 2^-11 of itself at most (or to SMALLEST_SHARE of the largest), where
    training in bf16 rounds W_eff to 2^-8; the training state keeps all digits.
    """
    alpha = wscale if linear.scale_index is None else wscale[:, linear.scale_index.to(wscale.device)]
    floor = SMALLEST_SHARE * alpha.abs().max()
    sign = torch.where(alpha >= 0, 1.0, -1.0)
    return (sign * alpha.abs().clamp(min=floor)).half().float()


def _binary(module: nn.Module) -> BinaryLinear:
    if not isinstance(module, BinaryLinear) or module.pattern != "column":
        raise ValueError("only `column` scales can be shared")
    return module


def _make_positive(linear: BinaryLinear) -> None:
    negative = linear.wscale < 0  # [1, K]
    smallest = torch.finfo(torch.float32).tiny  # stands for 0, whose sign is +1 whatever is done to it
    flipped = torch.where(linear.weight == 0, -smallest, -linear.weight)
    linear.weight.copy_(torch.where(negative, flipped, linear.weight))
    linear.wscale.abs_()


def _ratio(a: BinaryLinear, b: BinaryLinear) -> float:
    """How much larger the scales of `a` are; 1 where a matrix has none but zeros, or no values here (parallel.py)."""
    if a.wscale.is_meta:
        return 1.0
    size_a, size_b = (float(linear.wscale.double().square().mean().sqrt()) for linear in (a, b))
    return size_a / size_b if size_a > 0 and size_b > 0 else 1.0


def _move(source: BinaryLinear, target: BinaryLinear, factor: float) -> None:
    """Multiply what `source` computes by `factor` and divide what `target` makes of it by the same."""
    for scale in (source.wscale, source.wbias):
        scale.mul_(factor)
    for scale in (target.wscale, target.wbias):
        scale.div_(factor)


def _tie(*linears: BinaryLinear) -> None:
    squares = torch.stack([linear.wscale.double().square() for linear in linears])  # exact, so equal scales stay
    shared = nn.Parameter(squares.mean(0).sqrt().float())
    for linear in linears:
        linear.wscale = shared


def _tie_query_heads(o: BinaryLinear, groups: int, heads_of_group: int) -> None:
    """Let column (group, head, i) of o_proj take the scale of (group, 0, i)."""
    by_head = o.wscale.view(groups, heads_of_group, -1)
    by_head.copy_(by_head.double().square().mean(1, keepdim=True).sqrt().float().expand_as(by_head))
    index = torch.arange(o.wscale.shape[1]).view_as(by_head)
    o.scale_index = index[:, :1].expand_as(index).reshape(-1)
