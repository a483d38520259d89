"""The experiments of the results page in small: every run is made once, compared window by window, and drawn."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from support.tiny_run import DOCUMENTS, model_config, training_config

from fbiedge.errors import UsageError
from fbiedge.training import default_model, experiments
from fbiedge.training.checkpoint import load_model
from fbiedge.training.evaluation import held_out_loss
from fbiedge.training.plan import RunPlan
from fbiedge.training.tokenizer import read_tokenizer


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts, bodies and schedules of a second; corpora are not looked for."""
    model = model_config("column", vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, max_position_embeddings=32)  # fmt: skip
    training = training_config(steps=4, eval_every=2, eval_sequences=2, batch_size=2, warmup_steps=1)
    monkeypatch.setattr(default_model, "MODEL", model)
    monkeypatch.setattr(default_model, "TRAINING", training)
    monkeypatch.setattr(default_model, "check_corpora", lambda data: None)
    monkeypatch.setattr(experiments, "MODEL", model)
    monkeypatch.setattr(experiments, "TRAINING", training)
    (tmp_path / "recipe" / "text").mkdir(parents=True)
    for name in ("train", "held_out_stories", "held_out_dialogues"):
        (tmp_path / "recipe" / "text" / f"{name}.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    return tmp_path


def test_one_command_trains_compares_and_draws_all_runs(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = default_model.stages
    monkeypatch.setattr(default_model, "stages", lambda out: plans(out, dict.fromkeys(default_model.STEPS, 2)))
    recipe, out, results = small / "recipe", small / "runs", small / "results"
    with pytest.raises(UsageError, match="unknown run 'rows'; expected one of column, one-hot targets"):
        experiments.main(small, recipe, out, results, only=["rows"])
    experiments.main(small, recipe, out, results, only=["column"])
    assert not results.exists()
    experiments.main(small, recipe, out, results)

    rows = list(csv.DictReader((results / "held_out.csv").open()))
    asked = [(key, run) for key, names in experiments.QUESTIONS.items() for run in names]
    assert [(row["question"], row["run"]) for row in rows] == asked
    for row in rows:
        low, middle, high = (float(row[name]) for name in ("low", "difference", "high"))
        assert low <= middle <= high and int(row["tokens"]) == 4 * 2 * 32
    model = load_model(out / "row" / "model")
    tokenizer = read_tokenizer(out / "row" / "model" / "tokenizer.json")
    whole = held_out_loss(model, recipe / experiments.HELD_OUT, tokenizer, small / "tokens")
    assert float(next(row for row in rows if row["run"] == "row")["held_out"]) == pytest.approx(
        whole.nats_per_token, abs=1e-4
    )

    points = list(csv.DictReader((results / "curves.csv").open()))
    assert {point["run"] for point in points} == {run for _, run in asked}
    assert all((point["flip_flop"] == "") == (point["run"] == "full precision") for point in points)
    assert sorted(path.name for path in results.glob("*.png")) == ["a.png", "b.png", "c.png", "d.png", "seed.png"]
    pretrained = RunPlan.load(out / "pretrained-start")
    assert pretrained.init == str((out / "full-precision" / "model").resolve())
    assert RunPlan.load(out / "one-hot-targets").teacher is None
    assert RunPlan.load(out / "column-shared").shared_scales


def test_a_difference_is_that_of_pairs() -> None:
    random = np.random.default_rng(1)
    easy_and_hard = random.normal(3, 1, 400)
    other = easy_and_hard + 0.01 + random.normal(0, 0.001, 400)
    mean, low, high = experiments.difference(easy_and_hard, other)
    assert low < 0.01 < high and high - low < 0.001
    assert mean == pytest.approx(float((other - easy_and_hard).mean()))
