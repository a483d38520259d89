"""When to give up: a loss that is no number, or one that rose far above its recent level and stays there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MEMORY = 50  # steps over which the level is smoothed: a spike of one step hardly moves it


class LossWatch:
    """Follows the losses of a run; part of its saved state, so that a resumed run gives up at the same step.

    The level is an exponential mean of the losses. A step is high when its loss is more than `jump` nats above the lowest
    level so far; `patience` high steps in a row end the run. Binary students have short spikes from which they recover,
    while a loss that is back at guessing doesn't return: 2 nats are a third to a fifth of the way there. The first steps
    only make the level, as one easy batch says nothing of it.
    """

    def __init__(self, jump: float, patience: int) -> None:
        self.jump, self.patience = jump, patience
        self.level, self.lowest, self.high_steps, self.seen = math.nan, math.inf, 0, 0

    @property
    def is_calm(self) -> bool:
        """Whether the last step was not high: what is saved now is worth going back to."""
        return self.high_steps == 0

    def see(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Take in the loss of one step, before the step changes the weights; returns why the run must end, if it must."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"step {step}: loss {loss}, gradient norm {grad_norm}"
        taken = min(loss, self.lowest + self.jump)  # a spike of thousands says no more than a spike of two
        weight = 1 / min(self.seen + 1, _MEMORY)  # at first the plain mean
        self.level = taken if self.seen == 0 else self.level + weight * (taken - self.level)
        self.seen += 1
        if self.seen >= _MEMORY:
            self.lowest = min(self.lowest, self.level)
        self.high_steps = self.high_steps + 1 if loss > self.lowest + self.jump else 0
        if self.high_steps >= self.patience:
            return (
                f"step {step}: loss {loss:.3f}; it was {self.lowest:.3f} and has been more than {self.jump:g} above that "
                f"for {self.high_steps} steps"
            )
        return None

    def state(self) -> Tensor:
        return torch.tensor([self.level, self.lowest, self.high_steps, self.seen], dtype=torch.float64)

    def restore(self, state: Tensor) -> None:
        self.level, self.lowest, high_steps, seen = state.tolist()
        self.high_steps, self.seen = int(high_steps), int(seen)
