"""A run as it was logged: RUN/run.json and RUN/metrics.jsonl read back, whoever wrote them and however far it got."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.errors import FbiEdgeError, UsageError, printable

from .plan import RunPlan

Column = npt.NDArray[np.float64]
LAYER_FIELDS = ("flip_flop", "alpha_mean", "alpha_std", "beta_mean", "beta_std")
FIELDS = (
    "step", "tokens", "loss", "one_hot_loss", "distillation_loss", "eval_loss", "learning_rate", "grad_norm",
    "tokens_per_second", "mfu",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class History:
    """Columns over the logged steps, in their order; NaN where a step has no such number."""

    name: str
    folder: Path
    plan: RunPlan
    columns: dict[str, Column]  # FIELDS, each [steps]
    layers: dict[str, Column]  # LAYER_FIELDS, each [layers, steps]; no layers for a run without

    @property
    def steps(self) -> int:
        """The last one that was logged."""
        return int(self.columns["step"][-1])

    def known(self, field: str) -> tuple[Column, Column]:
        """Tokens and values of the steps that have a number in this field."""
        there = ~np.isnan(self.columns[field])
        return self.columns["tokens"][there], self.columns[field][there]

    def known_layers(self, field: str) -> tuple[Column, Column]:
        """Tokens [steps] and values [layers, steps] of the steps that looked at the layers."""
        values = self.layers[field]
        there = ~np.isnan(values).all(axis=0) if len(values) else np.zeros(len(self.columns["step"]), bool)
        return self.columns["tokens"][there], values[:, there]


def read_histories(runs: Sequence[Path]) -> list[History]:
    """Each run under the shortest end of its path that tells it from the others. Raises UsageError, in one line."""
    resolved = [run.resolve() for run in runs]
    for index, run in enumerate(resolved):
        if run in resolved[:index]:
            raise UsageError(f"{runs[index]} is given twice")
    length = 1
    while len({run.parts[-length:] for run in resolved}) < len(resolved):
        length += 1
    return [_read(run, printable("/".join(whole.parts[-length:]))) for run, whole in zip(runs, resolved, strict=True)]


def _read(run: Path, name: str) -> History:
    try:
        plan = RunPlan.load(run)
    except FbiEdgeError as error:
        there = (run / "run.json").exists()
        reason = f"its run.json can't be read ({error.__cause__ or error})" if there else "it has no run.json"
        raise UsageError(f"{run} is no run of `fbiedge train`: {reason}") from error
    records = _read_metrics(run / "metrics.jsonl")
    if not records:
        raise UsageError(f"{run} has logged no step yet; its first comes with step 10, or the first evaluation")
    by_step = [records[step] for step in sorted(records)]
    columns = {field: np.array([record[field] for record in by_step]) for field in FIELDS}
    tokens_per_step = plan.training.batch_size * plan.training.sequence_length
    columns["tokens"] = np.where(np.isnan(columns["tokens"]), columns["step"] * tokens_per_step, columns["tokens"])
    deepest = max(len(record["layers"]) for record in by_step)
    none = [dict.fromkeys(LAYER_FIELDS, math.nan)]
    padded = [record["layers"] + none * (deepest - len(record["layers"])) for record in by_step]
    layers = {
        field: np.array([[layer[field] for layer in record] for record in padded]).reshape(len(by_step), deepest).T
        for field in LAYER_FIELDS
    }
    return History(name=name, folder=run, plan=plan, columns=columns, layers=layers)


def _read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Records by step; of a step that is there twice the later. A last line without its end is still being written."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    records = {}
    *lines, torn = text.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = _record(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            shown = printable(line[:60].decode(errors="replace"))
            raise UsageError(f"{path}, line {number}: no record of a training step: {shown}") from error
        records[int(record["step"])] = record
    if torn and not records and not torn.startswith(b"{"):
        raise UsageError(f"{path} holds no record of a training step")
    return records


def _record(raw: dict[str, Any]) -> dict[str, Any]:
    """Its numbers, NaN for what is null or what an earlier version didn't write. Raises for anything else."""
    if not isinstance(raw["step"], int) or raw["step"] < 1 or raw["loss"] is None:
        raise ValueError("no step or no loss")
    number: Callable[[Any], float] = lambda value: math.nan if value is None else _float(value)
    record: dict[str, Any] = {field: number(raw.get(field)) for field in FIELDS}
    record["layers"] = [
        {field: number(layer.get(field)) for field in LAYER_FIELDS} for layer in raw.get("layers") or []
    ]
    return record


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("no number")
    return float(value)
