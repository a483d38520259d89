"""A run as it was logged: RUN/run.json and RUN/metrics.jsonl read back, whoever wrote them and however far it got."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.errors import FbiEdgeError, UsageError, printable

from .plan import RunPlan
from .records import LONGEST_LINE

Column = npt.NDArray[np.float64]
LAYER_FIELDS = ("flip_flop", "alpha_mean", "alpha_std", "beta_mean", "beta_std")
FIELDS = (
    "step", "tokens", "loss", "one_hot_loss", "distillation_loss", "eval_loss", "learning_rate", "grad_norm",
    "tokens_per_second", "mfu",
)  # fmt: skip
_ABSURD = 1e30  # no step, no token count and no loss is as large


@dataclass(frozen=True, kw_only=True)
class History:
    """Columns over the logged steps, in their order; NaN where a step has no such number, or one that can't be drawn."""

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

    def flip_flop(self) -> tuple[Column, Column]:
        """Tokens and the share of all binary weights whose sign the step changed: layers have equally many."""
        tokens, layers = self.known_layers("flip_flop")
        return tokens, np.nanmean(layers, axis=0) if layers.size else np.empty(0)


def read_histories(runs: Sequence[Path]) -> list[History]:
    """Each run under the shortest end of its path that tells it from the others. Raises UsageError, in one line."""
    resolved = [Path(os.path.realpath(run)) for run in runs]  # no error for a link in a circle
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
    ordered = [records[step] for step in sorted(records)]
    columns = dict(zip(FIELDS, np.array([numbers for numbers, _ in ordered]).T, strict=True))
    if np.isnan(columns["loss"]).all():
        raise UsageError(f"{run / 'metrics.jsonl'} holds no loss that is a number")
    _fill_in(columns, plan)
    deepest = max(len(layers) for _, layers in ordered)
    padded = np.full((len(ordered), deepest, len(LAYER_FIELDS)), math.nan)
    for row, (_, layers) in zip(padded, ordered, strict=True):
        row[: len(layers)] = layers
    by_field = dict(zip(LAYER_FIELDS, padded.transpose(2, 1, 0), strict=True))
    return History(name=name, folder=run, plan=plan, columns=columns, layers=by_field)


def _fill_in(columns: dict[str, Column], plan: RunPlan) -> None:
    """What an earlier version didn't write, but its plan tells."""

    def fill(field: str, values: Column) -> None:
        columns[field] = np.where(np.isnan(columns[field]), values, columns[field])

    fill("tokens", columns["step"] * plan.training.batch_size * plan.training.sequence_length)
    if plan.teacher is None or plan.training.one_hot_share == 1:
        fill("one_hot_loss", columns["loss"])
    elif plan.training.one_hot_share == 0:
        fill("distillation_loss", columns["loss"])


_Record = tuple[Column, Column]  # FIELDS, and [layers, LAYER_FIELDS]: a long run has too many for dictionaries


def _read_metrics(path: Path) -> dict[int, _Record]:
    """Records by step; of a step that is there twice the later. A last line without its end is still being written."""
    records = {}
    try:
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE)
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    break
                try:
                    raw = json.loads(line)
                    records[_step(raw)] = _record(raw)
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                    shown = printable(line[:60].rstrip(b"\n").decode(errors="replace"))
                    raise UsageError(f"{path}, line {number}: no record of a training step: {shown}") from error
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    if line and not records and not line.startswith(b"{"):
        raise UsageError(f"{path} holds no record of a training step")
    return records


def _step(raw: dict[str, Any]) -> int:
    step = raw["step"]
    if not isinstance(step, int) or not 1 <= step < _ABSURD or raw["loss"] is None:
        raise ValueError("no step or no loss")
    return step


def _record(raw: dict[str, Any]) -> _Record:
    """Its numbers, NaN for what is null or what an earlier version didn't write. Raises for anything else."""
    layers = [[_number(layer.get(field)) for field in LAYER_FIELDS] for layer in raw.get("layers") or []]
    return np.array([_number(raw.get(field)) for field in FIELDS]), np.array(layers).reshape(-1, len(LAYER_FIELDS))


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("no number")
    return float(value) if abs(value) < _ABSURD else math.nan
