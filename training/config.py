"""TrainConfig: every hyperparameter of a run, stored in run.json beside the weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fbiedge.errors import UsageError

Precision = Literal["fp32", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Defaults are the published recipe (FBI-LLM §4) except for the sizes, which fit one CPU."""

    steps: int
    batch_size: int = 16  # sequences per optimizer step
    sequence_length: int = 256  # tokens per sequence
    learning_rate: float = 3e-4
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    one_hot_share: float = 0.0  # of the loss, beside distillation; without a teacher the loss is one-hot alone
    head: Precision = "fp32"  # as the export will hold it, see quantized_head.py
    embedding: Precision = "fp32"  # likewise
    loss_chunk: int = 1024  # positions whose logits are held at once
    micro_batch_size: int = 0  # sequences a process computes at once, gradients adding up; 0: all of its share
    seed: int = 11111
    bf16: bool = True  # autocast; latents, moments and losses stay fp32
    cache_teacher: bool = (
        False  # it reads each window once, see teacher_cache.py; every epoch then has the same windows
    )
    compile: bool = False  # torch.compile of each decoder layer: a minute at the start, then faster steps
    activation_checkpointing: bool = False  # keep a layer's input only and compute it again backward: a third more work
    checkpoint_every: int = 200  # optimizer steps
    async_checkpoint: bool = False  # write states in the background; RUN/model then only when the run ends
    loss_jump: float = 2.0  # nats above the lowest level of the loss so far: a run that stays there has diverged
    loss_jump_steps: int = 50  # in a row
    eval_every: int = 200  # optimizer steps
    eval_sequences: int = 64  # held-out sequences per evaluation

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "sequence_length",
            "checkpoint_every",
            "eval_every",
            "eval_sequences",
            "loss_chunk",
            "loss_jump_steps",
        ):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a positive integer")
        for name in ("learning_rate", "grad_clip", "loss_jump"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("warmup_steps", "weight_decay", "seed", "micro_batch_size"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("min_learning_rate_ratio", "one_hot_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a number from 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a number from 0 to below 1")
        for name in ("head", "embedding"):
            if getattr(self, name) not in get_args(Precision):
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(get_args(Precision))}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up to learning_rate, then cosine down to its min_learning_rate_ratio at the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.min_learning_rate_ratio + (1 - self.min_learning_rate_ratio) * cosine)
