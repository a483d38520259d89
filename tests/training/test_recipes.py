"""Presets are the published recipes; every hyperparameter can be overridden, and run.json says what was chosen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import typer
from support.errors import raises_line
from support.tiny_run import model_config

from fbiedge.config import PRESETS
from fbiedge.errors import UsageError
from fbiedge.training import cli
from fbiedge.training.config import TrainConfig
from fbiedge.training.plan import RunPlan
from fbiedge.training.recipes import FINE_TUNE, FROM_SCRATCH, RECIPES, resolved

SAMPLES_OF_A_CHUNK, CHUNKS = 1_706_976, 360


def test_every_preset_has_a_recipe_that_fits_its_model() -> None:
    assert RECIPES.keys() == PRESETS.keys()
    for name, recipe in RECIPES.items():
        assert recipe.training.sequence_length <= PRESETS[name].max_position_embeddings


@pytest.mark.parametrize(
    ("name", "gpus", "sequences", "accumulated"), [("130m", 4, 32, 8), ("1.3b", 16, 18, 4), ("7b", 32, 6, 10)]
)
def test_published_batches_and_schedules(name: str, gpus: int, sequences: int, accumulated: int) -> None:
    training = RECIPES[name].training
    assert training.batch_size == gpus * sequences * accumulated and training.micro_batch_size == sequences
    micro_steps = SAMPLES_OF_A_CHUNK // (gpus * sequences) * CHUNKS
    assert training.steps == micro_steps // accumulated
    assert (training.learning_rate, training.min_learning_rate_ratio, training.warmup_steps) == (3e-4, 0.1, 2000)
    assert (training.beta1, training.beta2, training.weight_decay, training.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert (training.sequence_length, training.seed, training.one_hot_share, training.bf16) == (2048, 11111, 0, True)
    assert RECIPES[name].skip_chunks == (() if name == "130m" else (7, 12, 20, 24, 26))


def test_what_is_given_goes_before_the_preset() -> None:
    recipe, training = resolved("1.3b", False, {"steps": 7, "learning_rate": None, "bf16": False, "weight_decay": 0.0})
    assert training == dataclasses.replace(recipe.training, steps=7, bf16=False, weight_decay=0.0)
    assert resolved(None, False, {})[1] == FROM_SCRATCH
    assert resolved(None, True, {})[1] == FINE_TUNE


def test_every_hyperparameter_is_an_option() -> None:
    options = {parameter.name for parameter in typer.main.get_command(cli.app).params}
    assert {field.name for field in dataclasses.fields(TrainConfig)} - {"compile"} <= options
    assert "compile_model" in options


def test_the_command_resolves_a_preset_and_stores_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "130m", model_config("column"))
    out = tmp_path / "run"
    cli.main(["--preset", "130m", "--data", str(text), "-o", str(out), "--steps", "2", "--batch-size", "2",
              "--sequence-length", "16", "--beta2", "0.9", "--no-bf16"])  # fmt: skip
    expected = dataclasses.replace(
        RECIPES["130m"].training, steps=2, batch_size=2, sequence_length=16, beta2=0.9, bf16=False
    )
    plan = RunPlan.load(out)
    assert plan.training == expected
    assert (plan.preset, plan.teacher_dtype, plan.data) == ("130m", "bf16", (str(text),))
    printed = capsys.readouterr().out.replace("\n", " ")
    for name, value in expected.to_dict().items():
        assert f"{name}={value}" in printed, name


def test_a_plan_of_an_older_version_still_loads(text: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        json.dumps({"model": model_config("row").to_dict(), "training": {"steps": 5, "seed": 3}, "teacher": None})
    )
    plan = RunPlan.load(tmp_path)
    assert plan == RunPlan(model=model_config("row"), training=TrainConfig(steps=5, seed=3), teacher=None)
    plan.save(tmp_path)
    assert RunPlan.load(tmp_path) == plan


def test_amber_options_reach_the_data(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "1.3b", model_config("column"))
    chunks = tmp_path / "amber"
    chunks.mkdir()
    for chunk in range(6, 9):
        (chunks / f"train_{chunk:03}.jsonl").write_text((json.dumps({"token_ids": [chunk] * 33}) + "\n") * 20 + "{\n")
    arguments = ["--preset", "1.3b", "--data", str(chunks), "--teacher", str(teacher), "--steps", "1", "--batch-size", "2",
                 "--sequence-length", "32", "--eval-sequences", "2"]  # fmt: skip
    with raises_line(UsageError, "train_006.jsonl: line 21 is not JSON"):
        cli.main([*arguments, "-o", str(tmp_path / "a")])
    cli.main([*arguments, "--skip-corrupt", "-o", str(tmp_path / "b")])
    skipped = json.loads((tmp_path / "b" / "data.json").read_text())["skipped_lines"]
    assert skipped == {str(chunks / f"train_{chunk:03}.jsonl"): 1 for chunk in (6, 8)}  # 7 is left out from 1.3b on
    cli.main([*arguments, "--skip-corrupt", "--skip-chunks", "8", "-o", str(tmp_path / "c")])
    skipped = json.loads((tmp_path / "c" / "data.json").read_text())["skipped_lines"]
    assert set(skipped) == {str(chunks / f"train_{chunk:03}.jsonl") for chunk in (6, 7)}
    with raises_line(UsageError, "'8;' is no list of numbers"):
        cli.main([*arguments, "--skip-chunks", "8;", "-o", str(tmp_path / "d")])
