"""RunPlan: everything that decides a run's result, in RUN/run.json beside the weights."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError, UsageError
from fbiedge.files import atomic_file

from .config import TrainConfig

COLUMN_SHARED = "column-shared"
TeacherDtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """RUN/run.json holds it resolved, whatever preset it began as, so `--resume` needs nothing else."""

    model: ModelConfig
    training: TrainConfig
    teacher: str | None  # checkpoint folder
    teacher_dtype: TeacherDtype = "fp32"  # of its weights in memory
    init: str | None = None  # checkpoint folder whose weights the run starts from
    shared_scales: bool = False  # of a `column` model, see shared_scales.py
    preset: str | None = None  # what it began as, for the record
    data: tuple[str, ...] = ()  # what was read, for the record: the run reads shards
    held_out: tuple[str, ...] = ()
    shards: str | None = None  # folder of the token shards (corpus.py); None: the run's own
    shard_tokens: tuple[int, ...] = ()  # of each of them that is trained on: others would be another order of the data
    peak_tflops: float | None = None  # of one device, for MFU; None: what flops.py knows
    tensorboard: bool = False  # log to RUN/tensorboard, too
    wandb: str | None = None  # log to this project of Weights & Biases, too,
    wandb_run: str | None = None  # as its run of this id, whichever part of our run it is

    def __post_init__(self) -> None:
        if self.teacher_dtype not in get_args(TeacherDtype):
            raise UsageError(f"teacher dtype is {self.teacher_dtype!r}, expected one of fp32, bf16")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise UsageError(f"--peak-tflops is {self.peak_tflops}, expected a positive number")

    @property
    def scaling(self) -> str:
        """The scaling form by its full name: the model's pattern, or column-shared."""
        return COLUMN_SHARED if self.shared_scales else self.model.scaling_pattern

    def to_dict(self) -> dict[str, Any]:
        """run.json's contents."""
        return {**asdict(self), "model": self.model.to_dict(), "training": self.training.to_dict()}

    def save(self, run: Path) -> None:
        with atomic_file(run / "run.json") as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, run: Path) -> RunPlan:
        """Raises CheckpointError. What older runs didn't write has its default."""
        try:
            raw: dict[str, Any] = json.loads((run / "run.json").read_text())
            raw["model"] = ModelConfig.from_dict(raw["model"])
            raw["training"] = TrainConfig(**raw["training"])
            return cls(**raw | {name: tuple(raw.get(name, ())) for name in ("data", "held_out", "shard_tokens")})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{run}: no run to resume ({error}); start one without --resume") from error
