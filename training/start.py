"""Where a run begins: random weights, or (`--init`) those of a checkpoint, moved into the scaling form wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fbiedge.config import BLOCK_SIZE, ModelConfig, ScalingPattern

from .checkpoint import load_model
from .model import BinaryLinear, Llama


def start_anew(config: ModelConfig, seed: int, values: bool = True) -> Llama:
    """Random weights; without `values` on the meta device, see parallel.py."""
    if values:
        return Llama(config).initialize(seed)
    with torch.device("meta"):
        return Llama(config)


@torch.no_grad()
def start_from(checkpoint: Path, pattern: ScalingPattern, values: bool = True) -> Llama:
    """The model of `checkpoint` with its linears in the form `pattern`; unchanged where that is the form it has.

    A full-precision checkpoint gives its weights as latents, with scales by the published rule (the paper's "pretrained
    start"). From another binary form, signs and scales are a least-squares fit of W_eff, and each latent keeps its
    distance from zero, which says how firmly the sign is held. Without `values`: as start_anew. Raises CheckpointError.
    """
    source = load_model(checkpoint, values=values)
    if source.config.scaling_pattern == pattern:
        return source
    config = replace(source.config, scaling_pattern=pattern)
    if not values:
        return start_anew(config, 0, values=False)
    target = Llama(config)
    linears = dict(target.named_modules())
    tensors = target.state_dict()
    for name, module in source.named_modules():
        if name.endswith("_proj"):
            _convert(module, linears[name])
        elif not isinstance(module, BinaryLinear):
            for own, parameter in module.named_parameters(recurse=False):
                tensors[f"{name}.{own}"].copy_(parameter)
    return target


def _convert(source: nn.Module, target: nn.Module) -> None:
    if not isinstance(source, BinaryLinear):
        assert isinstance(source, nn.Linear) and isinstance(target, BinaryLinear)
        target.weight.copy_(source.weight)
        target.reset_scales()
        return
    dense = source.effective_weight()
    if not isinstance(target, BinaryLinear):
        assert isinstance(target, nn.Linear)
        target.weight.copy_(dense)
        return
    sign, alpha, beta = least_squares(dense, target.pattern)
    smallest = torch.finfo(torch.float32).tiny  # -0 would be +1
    target.weight.copy_(sign * source.weight.abs().clamp(min=smallest))
    target.wscale.copy_(alpha.reshape(target.wscale.shape))
    if beta is not None:
        target.wbias.copy_(beta.reshape(target.wbias.shape))


def least_squares(dense: Tensor, pattern: ScalingPattern) -> tuple[Tensor, Tensor, Tensor | None]:
    """Signs [N, K] and scales whose W_eff is near `dense` [N, K]: the best scales there are for these signs.

    block:  s = sign(w), alpha = mean |w| of the block; of all signs and scales, the best.
    else:   s = sign(w - mean w), then w is regressed on s and 1 over the weights that share a scale. With p = mean s:

        alpha = (mean(w·s) - p·mean(w)) / (1 - p²)        beta = mean(w) - p·alpha
    """
    w = dense.double()
    if pattern == "block":
        sign = torch.where(w >= 0, 1.0, -1.0)
        blocks = [block.abs().mean(1) for block in torch.split(w, BLOCK_SIZE, dim=1)]
        return sign.float(), torch.stack(blocks, dim=1).float(), None
    axes = {"column": (0,), "row": (1,), "single": (0, 1)}[pattern]
    mean = w.mean(axes, keepdim=True)
    sign = torch.where(w >= mean, 1.0, -1.0).double()
    p = sign.mean(axes, keepdim=True)
    alpha = ((w * sign).mean(axes, keepdim=True) - p * mean) / (1 - p * p).clamp(min=1e-12)  # all equal: 0
    return sign.float(), alpha.float(), (mean - p * alpha).float()
