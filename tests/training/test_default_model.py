"""The recipe of the bundled model on a text of a page: one command makes its models, stopped or not."""

from __future__ import annotations

import csv
import io
import json
import lzma
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.tiny_run import DOCUMENTS, model_config

from fbiedge.errors import UsageError
from fbiedge.training import default_model
from fbiedge.training.checkpoint import load_model
from fbiedge.training.run import RunPlan
from fbiedge.weights import BinaryLinear, open_checkpoint

STEPS = "4,4,3,2,3,2,3"


@pytest.fixture
def small_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Corpora of a few kilobytes where the recipe expects its own, and a model and schedules to match."""
    turns = "User 1: Hi, I have a cat.\nUser 2: I have a dog.\nUser 1: Is it big?\nUser 2: No, it is a small dog."
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([["Best Generated Conversation"], *([turns] for _ in range(40))])
    stories = "\n<|endoftext|>\n".join(DOCUMENTS)
    texts = {path: stories for path in default_model.STORIES}
    texts |= {path: table.getvalue() for path in default_model.DIALOGUES}
    texts[default_model.TITLED_STORIES] = f"The Hen\n{DOCUMENTS[0]}"
    texts[default_model.HELD_OUT_STORIES] = "\n\n".join(f"Once upon a time {text}" for text in DOCUMENTS)
    data = tmp_path / "data"
    for path, content in texts.items():
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        with lzma.open(data / path, "wt", encoding="utf-8") as file:
            file.write(content)
    small = {"batch_size": 2, "sequence_length": 32, "compile": False, "eval_sequences": 2, "checkpoint_every": 2}
    monkeypatch.setattr(default_model, "MODEL", model_config("column", vocab_size=320))
    monkeypatch.setattr(default_model, "TRAINING", replace(default_model.TRAINING, **small))
    for name in ("FINE_TUNE", "LONGER"):
        monkeypatch.setattr(default_model, name, replace(getattr(default_model, name), **small))
    return data


def test_one_command_makes_teacher_student_and_the_student_with_shared_scales(
    small_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    default_model.main(small_recipe, out, STEPS)
    rows = json.loads((out / "report.json").read_text())
    assert [(row["model"], row["text"]) for row in rows] == [
        (model, text) for model in default_model.STEPS for text in ("held_out_stories", "held_out_dialogues")
    ]
    plan, last = RunPlan.load(out / "shared"), RunPlan.load(out / "student-3")
    assert plan.scaling == last.scaling == "column-shared" and plan.init == str(out / "student" / "model")
    assert last.init == str(out / "student-2" / "model") and last.teacher == str(out / "teacher-3" / "model")
    weights = open_checkpoint(out / "student-3" / "model")
    student = open_checkpoint(out / "student" / "model")
    assert weights.files == student.files  # tokenizer, chat template, generation settings
    assert weights.config == student.config
    q, k, v = (weights.linear(f"model.layers.0.self_attn.{name}_proj") for name in "qkv")
    assert isinstance(q, BinaryLinear) and isinstance(k, BinaryLinear) and isinstance(v, BinaryLinear)
    assert np.array_equal(q.alpha, k.alpha) and np.array_equal(q.alpha, v.alpha)

    before = load_model(out / "student-3" / "model").state_dict()
    default_model.main(small_recipe, out, STEPS)  # nothing is left to do
    after = load_model(out / "student-3" / "model").state_dict()
    assert all(before[name].equal(after[name]) for name in before)


def test_placeholders_of_dialogues_become_names() -> None:
    turns = [
        ("1", "Hi, I'm [name]. And you?"),
        ("2", "I'm [user 2's name]. Hello [User 1], call me [name]."),
        ("1", "Nice to meet you, [name]! I live in [city]."),
    ]
    named = default_model.with_names(turns, random.Random(0))
    found = re.fullmatch(r"I'm (\w+)\. Hello (\w+), call me (\w+)\.", named[1][1])
    assert found and found[1] == found[3] != found[2] and {found[1], found[2]} <= set(default_model.NAMES)
    assert named[0] == ("1", f"Hi, I'm {found[2]}. And you?")
    assert named[2] == ("1", f"Nice to meet you, {found[1]}! I live in [city].")


@pytest.mark.parametrize("steps", ["", "1,2,3", "1,2,3,4,5,6,x"])
def test_steps_of_other_than_seven_numbers_are_refused(small_recipe: Path, tmp_path: Path, steps: str) -> None:
    with pytest.raises(UsageError, match=r"--steps is .* expected 7 numbers with commas between"):
        default_model.main(small_recipe, tmp_path / "runs", steps)
    assert not (tmp_path / "runs").exists()


def test_a_stage_begun_with_other_settings_is_not_gone_on_with(small_recipe: Path, tmp_path: Path) -> None:
    plan = default_model.stages(tmp_path / "runs", dict.fromkeys(default_model.STEPS, 2))["teacher"]
    default_model.run_stage("teacher", plan, small_recipe, tmp_path / "runs", Console(quiet=True))
    longer = replace(plan, training=replace(plan.training, steps=5))
    with pytest.raises(UsageError, match=r"teacher was begun with steps 2, not 5; choose another folder"):
        default_model.run_stage("teacher", longer, small_recipe, tmp_path / "runs", Console(quiet=True))


def test_missing_corpora_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train_head_recased_4M.txt.xz is missing"):
        default_model.main(tmp_path, tmp_path / "runs")
