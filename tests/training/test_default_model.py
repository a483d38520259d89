"""The recipe of the bundled model on a text of a page: one command makes its models, stopped or not."""

from __future__ import annotations

import csv
import io
import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny_run import DOCUMENTS, model_config

from fbiedge.errors import UsageError
from fbiedge.training import default_model
from fbiedge.training.checkpoint import load_model
from fbiedge.training.run import RunPlan
from fbiedge.weights import BinaryLinear, open_checkpoint

STEPS = {"teacher_steps": 4, "student_steps": 4, "shared_steps": 3, "longer_teacher_steps": 2, "final_steps": 3}


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
    default_model.main(small_recipe, out, **STEPS)
    rows = json.loads((out / "report.json").read_text())
    assert [(row["model"], row["text"]) for row in rows] == [
        (model, text)
        for model in ("teacher", "student", "shared", "longer-teacher", "final")
        for text in ("held_out_stories", "held_out_dialogues")
    ]
    plan, last = RunPlan.load(out / "shared"), RunPlan.load(out / "final")
    assert plan.scaling == last.scaling == "column-shared" and plan.init == str(out / "student" / "model")
    assert last.init == str(out / "shared" / "model") and last.teacher == str(out / "longer-teacher" / "model")
    weights = open_checkpoint(out / "final" / "model")
    student = open_checkpoint(out / "student" / "model")
    assert weights.files == student.files  # tokenizer, chat template, generation settings
    assert weights.config == student.config
    q, k, v = (weights.linear(f"model.layers.0.self_attn.{name}_proj") for name in "qkv")
    assert isinstance(q, BinaryLinear) and isinstance(k, BinaryLinear) and isinstance(v, BinaryLinear)
    assert np.array_equal(q.alpha, k.alpha) and np.array_equal(q.alpha, v.alpha)

    before = load_model(out / "final" / "model").state_dict()
    default_model.main(small_recipe, out, **STEPS)  # nothing is left to do
    after = load_model(out / "final" / "model").state_dict()
    assert all(before[name].equal(after[name]) for name in before)


def test_missing_corpora_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train_head_recased_4M.txt.xz is missing"):
        default_model.main(tmp_path, tmp_path / "runs")
