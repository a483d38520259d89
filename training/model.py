"""The student and the teacher: one Llama whose linears are BinaryLinear or, with scaling_pattern "none", nn.Linear.

Parameter names are those of the official checkpoints, so `state_dict()` is the file format.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fbiedge.config import BLOCK_SIZE, ModelConfig, ScalingPattern

from .quantized_head import Embedding


class SignSTE(torch.autograd.Function):
    """sign with sign(0) = +1 forward; identity backward (straight-through, no clipping, as published)."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        return torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0]


class BinaryLinear(nn.Module):
    """y = x · W_effᵀ with W_eff = wscale · sign(weight) + wbias (`block`: one scale per row and 128 inputs, no offset).

    `weight` [N, K] is the fp32 latent. W_eff is built densely each time: K·N work beside the M·N·K of the product,
    and one bf16 rounding under autocast, as in an ordinary linear. `scale_index` [K], where there is one, says which
    entry of wscale each input takes; the others are unused.
    """

    scale_index: Tensor | None

    def __init__(self, k: int, n: int, pattern: ScalingPattern, scale_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.pattern = pattern
        self.weight = nn.Parameter(torch.empty(n, k))
        self.wscale = nn.Parameter(torch.empty(scale_shape))
        if pattern != "block":
            self.wbias = nn.Parameter(torch.empty(scale_shape))
        self.register_buffer("scale_index", None, persistent=False)

    @torch.no_grad()
    def reset_scales(self) -> None:
        """The published "xnor" start: wbias = mean of W over the scaled axis, wscale = mean |W - wbias| over it."""
        w = self.weight
        if self.pattern == "block":
            for g in range(self.wscale.shape[1]):
                self.wscale[:, g] = w[:, g * BLOCK_SIZE : (g + 1) * BLOCK_SIZE].abs().mean(1)
            return
        axes = {"column": (0,), "row": (1,), "single": (0, 1)}[self.pattern]
        mean = w.mean(axes, keepdim=True)
        self.wbias.copy_(mean.reshape(self.wbias.shape))
        self.wscale.copy_((w - mean).abs().mean(axes, keepdim=True).reshape(self.wscale.shape))

    def scales(self) -> Tensor:
        """The alphas in use, in the shape of wscale."""
        return self.wscale if self.scale_index is None else self.wscale[:, self.scale_index]

    def effective_weight(self) -> Tensor:
        """W_eff [N, K]."""
        sign: Tensor = SignSTE.apply(self.weight)  # type: ignore[no-untyped-call]
        if self.pattern == "block":
            # Whole blocks and the rest apart: repeated scales that are cut, or padded weights, compiled by PyTorch 2.13
            # for a CPU, are read past their end.
            n, k = sign.shape
            whole = k - k % BLOCK_SIZE
            blocks = sign[:, :whole].reshape(n, -1, BLOCK_SIZE) * self.wscale[:, : whole // BLOCK_SIZE, None]
            dense = blocks.view(n, whole)
            return dense if whole == k else torch.cat((dense, sign[:, whole:] * self.wscale[:, -1:]), dim=1)
        return self.scales() * sign + self.wbias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight())


def _linear(config: ModelConfig, name: str) -> nn.Module:
    n, k = config.linear_shapes()[name]
    if config.scaling_pattern == "none":
        return nn.Linear(k, n, bias=False)
    return BinaryLinear(k, n, config.scaling_pattern, config.scale_shape(n, k))


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped KV heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = _linear(config, "self_attn.q_proj")
        self.k_proj = _linear(config, "self_attn.k_proj")
        self.v_proj = _linear(config, "self_attn.v_proj")
        self.o_proj = _linear(config, "self_attn.o_proj")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = (batch, tokens, -1, self.config.head_dim)
        q = rotate(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)  # [B, heads, T, D]
        k = rotate(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)  # [B, kv_heads, T, D]
        v = self.v_proj(x).view(heads).transpose(1, 2)
        grouped = self.config.num_key_value_heads != self.config.num_attention_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))
        return out


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config, "mlp.gate_proj")
        self.up_proj = _linear(config, "mlp.up_proj")
        self.down_proj = _linear(config, "mlp.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Mlp(config)
        self.recompute = False  # backward, instead of keeping what lies between input and output

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.compute, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            return out
        return self.compute(x, cos, sin)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """ids int64 [B, T] -> logits [B, T, vocab]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check_trainable("this model")
        self.config = config
        self.shared_scales = False  # see shared_scales.py
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        cos, sin = rope_tables(config)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def initialize(self, seed: int, std: float = 0.02) -> Llama:
        """Random start: matrices normal(0, std), norms 1, scales by the published xnor rule. Same seed, same model."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".weight"):
                parameter.normal_(0.0, std, generator=generator)
        for module in self.modules():
            if isinstance(module, BinaryLinear):
                module.reset_scales()
        return self

    def features(self, ids: Tensor) -> Tensor:
        """What the head sees, [B, T, hidden]."""
        tokens = ids.shape[1]
        out: Tensor = self.model(ids, self.cos[:tokens], self.sin[:tokens])
        return out

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.features(ids))
        return logits


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_position_embeddings, head_dim/2], in fp32 from fp64 angles."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * config.rope_theta**-half
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [B, heads, T, D]: the pairs are (i, i + D/2), as in Hugging Face's Llama."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
