"""A wider model that computes the same, and whose copies then learn apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_run import model_config, training_config

from fbiedge.cli import run as fbiedge
from fbiedge.initialize import init_checkpoint
from fbiedge.training.checkpoint import load_model
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.weights import expected_shapes, open_checkpoint, write_checkpoint
from fbiedge.widen import widen

LATENT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("column", {}),
        ("row", {}),
        ("single", {}),
        ("block", {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}),
        ("column", {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("column", {"tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize("factor", [2, 3])
def test_a_wider_model_computes_the_same(pattern: str, changes: dict[str, object], factor: int, tmp_path: Path) -> None:
    config = model_config(pattern, **changes)
    init_checkpoint(config, tmp_path / "narrow", 1)
    wide = widen(tmp_path / "narrow", tmp_path / "wide", factor, seed=7)
    assert wide == open_checkpoint(tmp_path / "wide").config
    assert (wide.hidden_size, wide.head_dim) == (factor * config.hidden_size, config.head_dim)
    narrow, now = load_model(tmp_path / "narrow"), load_model(tmp_path / "wide")
    ids = torch.arange(5, 45).view(2, 20)
    expected = narrow(ids)
    torch.testing.assert_close(now(ids), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_signs_stay_and_distances_are_drawn_by_the_seed(tmp_path: Path) -> None:
    config = model_config("column")
    init_checkpoint(config, tmp_path / "random")
    source = open_checkpoint(tmp_path / "random")
    tensors = {name: source.tensor(name) for name in expected_shapes(config)}
    # What has a sign but no distance, and the least that has one.
    tensors[LATENT][0, :4] = 0.0, -0.0, 1e-45, -1e-45
    write_checkpoint(tmp_path / "narrow", config, tensors.items(), {})
    latents = tensors[LATENT]
    for out, seed in (("wide", 1), ("again", 1), ("other", 2)):
        widen(tmp_path / "narrow", tmp_path / out, seed=seed)
    wide, again, other = (open_checkpoint(tmp_path / out).tensor(LATENT) for out in ("wide", "again", "other"))
    np.testing.assert_array_equal(wide, again)
    assert (wide != other).mean() > 0.99
    np.testing.assert_array_equal(wide >= 0, np.tile(latents >= 0, (2, 2)))
    old, new = (np.delete(many, [0, len(latents)], axis=0) for many in (np.tile(latents, (2, 2)), wide))
    ratio = new / old
    assert 0.5 <= ratio.min() < 0.51
    assert 1.49 < ratio.max() <= 1.5
    n, k = latents.shape
    assert (wide[:n, :k] != wide[n:, k:]).mean() > 0.99, "copies would learn alike"


def test_copies_learn_apart(teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow, start, run = tmp_path / "narrow", tmp_path / "start", tmp_path / "wide"
    plan = RunPlan(model=model_config("column"), training=training_config(), teacher=str(teacher), shared_scales=True)
    prepare_run(narrow, plan, [text], [])
    before = list(execute_run(narrow))[-1].eval_loss
    assert fbiedge(["widen", str(narrow / "model"), "-o", str(start), "--seed", "3"]) == 0
    assert f"wrote {start}: hidden size 128, 4 heads, 4 times the signs" in capsys.readouterr().out
    for first, *others in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):  # shared as before
        alpha = open_checkpoint(start).tensor(f"model.layers.0.{first}_proj.wscale")
        for other in others:
            np.testing.assert_array_equal(open_checkpoint(start).tensor(f"model.layers.0.{other}_proj.wscale"), alpha)
    training = training_config(steps=40, eval_every=40, seed=5)
    prepare_run(run, replace(plan, model=open_checkpoint(start).config, init=str(start), training=training), [text], [])
    after = list(execute_run(run))[-1].eval_loss
    assert before is not None
    assert after is not None
    assert after < before
    signs = open_checkpoint(run / "model").tensor(LATENT) >= 0
    n, k = (size // 2 for size in signs.shape)
    assert (signs[:n, :k] != signs[n:, k:]).mean() > 0.01


def test_what_cannot_be_widened_is_named(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pattern in ("column", "block"):
        init_checkpoint(model_config(pattern), tmp_path / pattern)
    init_checkpoint(model_config("column", model_type="qwen3"), tmp_path / "qwen3")
    for model, options, message in (
        (teacher, [], "is full precision, expected a binary model; name a student"),
        (
            tmp_path / "block",
            [],
            "has linears of 64 inputs, expected a multiple of 128: a copy would begin within a block",
        ),
        (tmp_path / "column", ["--factor", "1"], "the factor is 1, expected 2 or more"),
        (tmp_path / "column", ["--seed", "-1"], "seed is -1, expected a whole number of at least 0"),
        (tmp_path / "qwen3", [], "is a qwen3; training knows a Llama with unscaled RoPE only"),
        (tmp_path / "none", [], "doesn't exist; expected a checkpoint folder"),
    ):
        assert fbiedge(["widen", str(model), "-o", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert fbiedge(["widen", str(tmp_path / "column"), "-o", str(tmp_path / "block")]) == 2
    assert "holds a checkpoint already, which would be replaced" in capsys.readouterr().err
