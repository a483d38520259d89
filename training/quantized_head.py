"""The head as an export will hold it, so that a student learns with the rounding that it will run with.

Forward, the weights are those that `fbiedge export --head int8` or `int4` writes: blocks of 32 inputs with one fp16 scale, in
the arithmetic of exporters/onnx/head.py, whose prose says why. Backward, the gradient goes straight through to the
full-precision latent, as in BinaryLinear. What is trained is then what is exported: int8 to the last bit, int4 but for
blocks where two scales are equally good up to the order in which 32 squares are summed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import HeadPrecision

BLOCK = 32
# Codes that the largest weight of a block is tried on; beyond -8 it is clipped, and the others are the finer.
_INT4_EXTREMES = (-8.0, -7.5, -8.25, -8.5, -8.75, -9.0, -9.5)


def quantized(weight: Tensor, precision: HeadPrecision) -> Tensor:
    """`weight` [N, K] rounded as an export rounds it; its gradient is that of the rounded weights."""
    if precision == "fp32":
        return weight
    rounded: Tensor = _StraightThrough.apply(weight, precision)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, precision: HeadPrecision) -> Tensor:
        n, k = weight.shape
        blocks = F.pad(weight.float(), (0, -k % BLOCK)).view(n, -1, BLOCK)
        rounded = _int8(blocks) if precision == "int8" else _int4(blocks)
        return rounded.view(n, -1)[:, :k].to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


def _int8(blocks: Tensor) -> Tensor:
    """Blocks [N, b, 32] rounded to codes -127 ... 127 of the scale max|w| / 127."""
    scale = _half(blocks.abs().amax(-1, keepdim=True) / 127)
    return (blocks / _divisor(scale)).round_().clamp_(-127, 127).mul_(scale)


def _int4(blocks: Tensor) -> Tensor:
    """Blocks [N, b, 32] rounded to codes -8 ... 7 of the scale with the least squared error."""
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(blocks)
    least = torch.full_like(largest, torch.inf)
    for extreme in _INT4_EXTREMES:
        scale = _half(largest / extreme)
        tried = (blocks / _divisor(scale)).round_().clamp_(-8, 7).mul_(scale)
        error = (tried - blocks).square_().sum(-1, keepdim=True)
        better = error < least
        best = torch.where(better, tried, best)
        least = torch.where(better, error, least)
    return best


def _half(scale: Tensor) -> Tensor:
    return scale.half().float()


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
