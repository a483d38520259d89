"""Head and embedding as an export will hold them, so that a student learns with the rounding that it will run with.

Forward, the weights are those that `fbiedge export --head int8 --embedding int8` or `int4` writes: blocks of 32 inputs with one
fp16 scale, in the arithmetic of exporters/onnx/head.py, whose prose says why. Backward, the gradient goes straight through
to the full-precision latent, as in BinaryLinear. What is trained is what is exported, to the last bit: both sides compute
with the same float32 operations in the same order, down to the sum of 32 squares that chooses a scale of 4 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Precision

BLOCK = 32
# Codes that the largest weight of a block is tried on; beyond -8 it is clipped, and the others are the finer.
_INT4_EXTREMES = (-8.0, -7.5, -8.25, -8.5, -8.75, -9.0, -9.5)


def quantized(weight: Tensor, precision: Precision) -> Tensor:
    """`weight` [N, K] rounded as an export rounds it; its gradient is that of the rounded weights."""
    if precision == "fp32":
        return weight
    rounded: Tensor = _StraightThrough.apply(weight, precision)  # type: ignore[no-untyped-call]
    return rounded


class Embedding(nn.Embedding):
    """Rows of a table, as an export of `precision` will hold them."""

    precision: Precision = "fp32"

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., K]. A row is rounded by itself, so whichever is less is rounded: the table or what is looked up."""
        if self.precision == "fp32" or ids.numel() >= self.num_embeddings:
            return F.embedding(ids, quantized(self.weight, self.precision))
        return quantized(F.embedding(ids.flatten(), self.weight), self.precision).view(*ids.shape, -1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, precision: Precision) -> Tensor:
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
        error = _sum((tried - blocks).square_())
        better = error < least
        best = torch.where(better, tried, best)
        least = torch.where(better, error, least)
    return best


def _sum(blocks: Tensor) -> Tensor:
    """[N, b, 32] -> [N, b, 1], in the order that the exporter sums in."""
    while blocks.shape[-1] > 1:
        first, second = blocks.chunk(2, -1)
        blocks = first + second
    return blocks


def _half(scale: Tensor) -> Tensor:
    return scale.half().float()


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
