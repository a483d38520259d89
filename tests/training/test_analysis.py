"""`fbiedge analyze`: its tables are what runs logged and what their models hold, and it takes runs as they are found."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.tiny_run import model_config, training_config

from fbiedge import cli
from fbiedge.errors import FbiEdgeError, UsageError
from fbiedge.training.analysis import FILES, FINAL, Analysis, analyze
from fbiedge.training.checkpoint import load_model
from fbiedge.training.model import BinaryLinear
from fbiedge.training.progress import run_with_progress
from fbiedge.training.run import RunPlan, prepare_run

PICTURES = {"curves.png", "flip_flop.png", "flip_flop_layers.png", "alphas.png", "betas.png"}
TABLES = {"curves.csv", "layers.csv", "scales.csv", "histograms.csv"}


@pytest.fixture(scope="module")
def runs(text: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled one of scaling `column`, one of `block`, one in full precision."""
    folder = tmp_path_factory.mktemp("runs")
    for pattern, steps in (("column", 30), ("block", 20), ("none", 10)):
        plan = RunPlan(
            model=model_config(pattern), training=training_config(steps=steps, eval_every=10),
            teacher=str(teacher) if pattern == "column" else None,
        )  # fmt: skip
        prepare_run(folder / pattern, plan, [text], [])
        run_with_progress(folder / pattern, resume=False, console=Console(quiet=True), log_every=5)
    return folder


@pytest.fixture(scope="module")
def analysis(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Analysis, Path]:
    out = tmp_path_factory.mktemp("analysis") / "out"
    return analyze([runs / name for name in ("column", "block", "none")], out), out


def table(out: Path, name: str) -> list[dict[str, str]]:
    with open(out / name, newline="") as file:
        return list(csv.DictReader(file))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_holds_pictures_and_tables(analysis: tuple[Analysis, Path]) -> None:
    found, out = analysis
    assert {path.name for path in out.iterdir()} == PICTURES | TABLES == set(FILES)
    assert set(found.files) == set(out.iterdir())
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)


def test_curves_and_layers_are_what_was_logged(analysis: tuple[Analysis, Path], runs: Path) -> None:
    rows = table(analysis[1], "curves.csv")
    for name in ("column", "block", "none"):
        mine = [row for row in rows if row["run"] == name]
        for row, record in zip(mine, metrics(runs / name), strict=True):
            for field in ("step", "tokens", "loss", "distillation_loss", "eval_loss", "grad_norm", "mfu"):
                assert row[field] == "" if record[field] is None else float(row[field]) == pytest.approx(record[field])
    flips = [
        (row["run"], int(row["step"]), int(row["layer"]), float(row["flip_flop"]))
        for row in table(analysis[1], "layers.csv")
    ]
    assert flips == [
        (name, record["step"], layer, pytest.approx(values["flip_flop"]))
        for name in ("column", "block")
        for record in metrics(runs / name)
        for layer, values in enumerate(record["layers"])
    ]


def test_scales_are_those_of_the_model(analysis: tuple[Analysis, Path], runs: Path) -> None:
    rows = {(row["run"], row["scale"], row["projection"]): row for row in table(analysis[1], "scales.csv")}
    histograms = table(analysis[1], "histograms.csv")
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    expected = [(run, "alpha", kind) for run in ("column", "block") for kind in kinds]
    assert set(rows) == {*expected, *(("column", "beta", kind) for kind in kinds)}
    for (run, scale, kind), row in rows.items():
        model = load_model(runs / run / "model")
        linears = [m for name, m in model.named_modules() if name.endswith(kind) and isinstance(m, BinaryLinear)]
        values = torch.cat([(m.wscale if scale == "alpha" else m.wbias).detach().flatten() for m in linears]).numpy()
        assert int(row["count"]) == len(values)
        assert float(row["mean"]) == pytest.approx(values.mean(), rel=1e-4, abs=1e-9)
        assert float(row["p50"]) == pytest.approx(np.median(values), rel=1e-4, abs=1e-9)
        bins = [h for h in histograms if (h["run"], h["scale"], h["projection"]) == (run, scale, kind)]
        for bin_ in bins[20:40]:
            low, high = float(bin_["from"]), float(bin_["to"])
            assert abs(int(bin_["count"]) - ((values >= low) & (values < high)).sum()) <= 1  # edges have 9 digits here


def test_findings_say_it_in_short(analysis: tuple[Analysis, Path], runs: Path) -> None:
    column, block, none = analysis[0].findings
    logged = metrics(runs / "column")
    evaluated = {record["eval_loss"]: record["step"] for record in logged if record["eval_loss"] is not None}
    assert (column.steps, column.planned_steps, column.tokens) == (30, 30, 30 * 4 * 32)
    assert (column.best_held_out, column.best_step) == (min(evaluated), evaluated[min(evaluated)])
    assert column.next_token_loss == logged[-1]["one_hot_loss"] != logged[-1]["loss"]
    flips = [layer["flip_flop"] for record in logged[-FINAL:] for layer in record["layers"]]
    assert column.flip_flop == pytest.approx(np.mean(flips))
    assert column.alpha is not None and column.beta is not None and not column.missing
    assert block.beta is None and none.flip_flop is None and none.alpha is None
    assert none.missing == ("full precision: no signs, no scales",)


def test_a_run_of_an_earlier_version_has_what_it_logged(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "old"
    shutil.copytree(runs / "block", run)
    kept = ("step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "eval_loss")
    lines = [{name: record[name] for name in kept} for record in metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [found] = analyze([run], tmp_path / "out").findings
    assert found.flip_flop is None and found.alpha is not None
    assert found.missing == ("no layers in its metrics, as an earlier version wrote them: no flip-flop ratio",)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "curves.png", "curves.csv", "alphas.png", "scales.csv", "histograms.csv",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "trained"), [("column", "distillation_loss"), ("none", "one_hot_loss")])
def test_the_loss_of_an_earlier_version_is_known_by_what_it_trained(
    name: str, trained: str, runs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "old"
    shutil.copytree(runs / name, run)
    lines = [{"step": record["step"], "loss": record["loss"]} for record in metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    analyze([run], tmp_path / "out")
    rows, known = table(tmp_path / "out", "curves.csv"), {"step", "tokens", "loss", trained}
    assert {field for row in rows for field, value in row.items() if value} == {"run", *known}
    assert all(row[trained] == row["loss"] for row in rows)
    assert [int(row["tokens"]) for row in rows] == [record["tokens"] for record in metrics(runs / name)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1.0, 0.0])
def test_numbers_that_no_training_has_are_gaps_or_drawn(
    value: float, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "column", run)
    shutil.rmtree(run / "model")
    broken = metrics(run)
    for record in broken[1:]:
        record["layers"] = [dict.fromkeys(layer, value) for layer in record["layers"]]
        record |= {field: value for field in record if field not in ("step", "layers")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in broken))
    assert cli.run(["analyze", str(run), "-o", str(tmp_path / "out")]) == 0
    assert not capsys.readouterr().err
    first, second, *_ = table(tmp_path / "out", "curves.csv")
    assert first["loss"] and second["loss"] == ("" if abs(value) != abs(value) or abs(value) > 1 else f"{value:.0f}")


def test_scales_at_the_end_of_fp32_are_drawn(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "column", run)
    tensors = load_file(run / "model" / "model.safetensors")
    ends = {name: torch.full_like(tensors[name], 3e38) for name in tensors if name.endswith(("wscale", "wbias"))}
    for values in ends.values():
        values.flatten()[::2] *= -1
    save_file(tensors | ends, run / "model" / "model.safetensors", metadata={"format": "pt"})
    [found] = analyze([run], tmp_path / "out").findings
    assert found.alpha is not None and found.alpha[1] == pytest.approx(3e38)


def test_a_run_under_way_is_shown_as_far_as_it_got(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "young"
    shutil.copytree(runs / "column", run)
    shutil.rmtree(run / "model")
    first, second, *_ = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(first + second[:100])
    [found] = analyze([run], tmp_path / "out").findings
    assert (found.steps, found.planned_steps, found.best_held_out) == (5, 30, None)
    assert found.missing == ("no held-out loss yet", "no model saved yet: no scales")


def test_an_analysis_is_replaced_as_a_whole(runs: Path, tmp_path: Path) -> None:
    analyze([runs / "column"], tmp_path / "out")
    analyze([runs / "none"], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curves.png", "curves.csv"}


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        shutil.copytree(runs / "none", tmp_path / place / "run")
    found = analyze([tmp_path / "a" / "run", tmp_path / "b" / "run", runs / "block"], tmp_path / "out").findings
    assert [one.run for one in found] == ["a/run", "b/run", f"{runs.name}/block"]


def line(text: str) -> Callable[[Path], object]:
    return lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + text + "\n{}\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "is no run of `fbiedge train`: it has no run.json"),
        (lambda run: (run / "run.json").write_text("{"), "its run.json can't be read"),
        (lambda run: (run / "run.json").write_text('{"model": 3, "training": 4}'), "its run.json can't be read"),
        (lambda run: (run / "run.json").write_bytes(b"\xff\xfe"), "its run.json can't be read"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has logged no step yet"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "has logged no step yet"),
        (lambda run: (run / "metrics.jsonl").write_text("%PDF"), "holds no record of a training step"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n'), "holds no loss that is a number"),
        (line("%PDF"), "metrics.jsonl, line 2: no record of a training step: %PDF"),
        (line("[1, 2]"), "line 2: no record"),
        (line('{"step": 2}'), "line 2: no record"),
        (line('{"step": "2", "loss": 1.0}'), "line 2: no record"),
        (line('{"step": 0, "loss": 1.0}'), "line 2: no record"),
        (line('{"step": 2, "loss": "low"}'), "line 2: no record"),
        (line('{"step": 1' + "0" * 400 + ', "loss": 1.0}'), "line 2: no record"),
        (line('{"step": 2, "loss": 1.0, "layers": "many"}'), "line 2: no record"),
        (line('{"step": 2, "loss": 1.0, "layers": [{"flip_flop": []}]}'), "line 2: no record"),
        (line("[" * 100_000), "line 2: no record"),
        (lambda run: (run / "model" / "model.safetensors").write_bytes(b"no"), "model.safetensors"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_one_line_and_nothing_is_written(
    damage: Callable[[Path], object], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "block", run)
    damage(run)
    assert cli.run(["analyze", str(run), "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_files_and_the_same_run_twice_are_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(FbiEdgeError, match="holds .*, which is no part of an analysis"):
        analyze([runs / "block"], runs)
    (tmp_path / "mine" / "curves.png").mkdir(parents=True)
    with pytest.raises(FbiEdgeError, match="holds curves.png, which is no part of an analysis"):
        analyze([runs / "block"], tmp_path / "mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UsageError, match="circle is no run"):
        analyze([tmp_path / "circle"], tmp_path / "out")
    with pytest.raises(UsageError, match="is given twice"):
        analyze([runs / "block", runs / ".." / runs.name / "block"], tmp_path / "out")


def test_the_command_prints_what_it_found(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert cli.run(["analyze", str(runs / "column"), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    for part in ("column", "3,840", "down_proj", "beta", f"wrote {out / 'flip_flop_layers.png'}"):
        assert part in printed
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.run(["analyze", str(runs / "column"), "-o", str(tmp_path / "other")]) == 2
    assert "pip install 'fbiedge[analyze]'" in capsys.readouterr().err and not (tmp_path / "other").exists()
