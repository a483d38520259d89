"""The results page says what its tables and figures say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fbiedge.training import experiments

TRAINING = Path(__file__).parents[2] / "training"
PAGE = (TRAINING / "RESULTS.md").read_text()


def rows() -> list[dict[str, str]]:
    with (TRAINING / "results" / "held_out.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['question']}: {row['run']}")
def test_every_row_of_the_table_stands_on_the_page(row: dict[str, str]) -> None:
    held_out, apart, low, high = (float(row[name]) for name in ("held_out", "difference", "low", "high"))
    shown = "" if low == high else f" {apart:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
    assert f"| {row['run']} | {held_out:.3f} |{shown} |" in PAGE


def test_page_table_and_curves_know_the_same_runs() -> None:
    asked = [(key, run) for key, names in experiments.QUESTIONS.items() for run in names]
    assert [(row["question"], row["run"]) for row in rows()] == asked
    with (TRAINING / "results" / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    training = experiments.TRAINING
    for run in {run for _, run in asked}:
        last = [point for point in points if point["run"] == run][-1]
        assert int(last["step"]) == training.steps and last["held_out"]
        assert int(last["tokens"]) == training.steps * training.batch_size * training.sequence_length


@pytest.mark.parametrize("key", experiments.QUESTIONS)
def test_every_figure_is_shown(key: str) -> None:
    assert (TRAINING / "results" / f"{key}.png").stat().st_size > 10_000
    assert f"](results/{key}.png)" in PAGE
