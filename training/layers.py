"""What a step did to each decoder layer: the share of its signs that flipped, and where its scales stand.

A binary weight learns by crossing zero. The flip-flop ratio of a step, signs that it changed by all signs, tells a student
that still looks for its signs from one that has found them and moves its scales only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .model import BinaryLinear
from .parallel import Team, decoder_layers


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One decoder layer, over all its binary linears together. Standard deviations are those of the scales themselves."""

    flip_flop: float  # share of its signs that the optimizer's step changed
    alpha_mean: float
    alpha_std: float
    beta_mean: float | None  # None where the scaling form has no beta
    beta_std: float | None


class LayerWatch:
    """Compares the layers of `model` before an optimizer step with those after it.

    Each process counts its own part of every weight, and sums are added up over all: `after` is called by all together.
    """

    def __init__(self, model: nn.Module, here: Team) -> None:
        self.here = here
        self.layers = [
            [module for module in layer.modules() if isinstance(module, BinaryLinear)]
            for layer in decoder_layers(model)
        ]
        self.is_binary = any(self.layers)
        self._signs: list[Tensor] = []

    def before(self) -> None:
        """Remember the signs, a byte each."""
        self._signs = [_signs(linear) for layer in self.layers for linear in layer]

    def after(self) -> tuple[LayerReport, ...]:
        """What has changed since `before`."""
        signs = iter(self._signs)
        sums = torch.stack(
            [torch.stack([_sums(linear, next(signs)) for linear in layer]).sum(0) for layer in self.layers]
        )
        self._signs = []
        rows = torch.tensor(self.here.mean(sums.flatten()), dtype=torch.float64).view_as(sums)
        reports = []
        for flips, weights, *scales in rows.tolist():
            (alpha_mean, alpha_std), (beta_mean, beta_std) = _moments(*scales[:3]), _moments(*scales[3:])
            assert alpha_mean is not None and alpha_std is not None
            reports.append(
                LayerReport(
                    flip_flop=flips / weights, alpha_mean=alpha_mean, alpha_std=alpha_std, beta_mean=beta_mean,
                    beta_std=beta_std,
                )
            )  # fmt: skip
        return tuple(reports)


def _signs(linear: BinaryLinear) -> Tensor:
    return _local(linear.weight) >= 0  # as SignSTE has it


@torch.no_grad()
def _sums(linear: BinaryLinear, before: Tensor) -> Tensor:
    """fp64 [8] over this process's part: signs changed, signs, then count, sum and sum of squares of alpha and of beta."""
    signs = _signs(linear)
    parts = [torch.stack(((signs != before).sum(), torch.tensor(signs.numel(), device=signs.device))).double()]
    alpha = _local(linear.wscale)
    if linear.scale_index is not None:
        alpha = alpha[:, linear.scale_index]
    beta = alpha[:0] if linear.pattern == "block" else _local(linear.wbias)
    for scales in (alpha.double(), beta.double()):
        parts.append(torch.stack((scales.new_tensor(scales.numel()), scales.sum(), scales.square().sum())))
    return torch.cat(parts)


def _moments(count: float, total: float, squares: float) -> tuple[float | None, float | None]:
    """Mean and standard deviation; in fp64 the difference of squares keeps nine digits where the deviation is 1e-3 of the mean."""
    if not count:
        return None, None
    mean = total / count
    return mean, max(0.0, squares / count - mean * mean) ** 0.5


def _local(parameter: Tensor) -> Tensor:
    """This process's part; parts don't overlap."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
