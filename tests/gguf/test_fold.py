"""Folding changes where scales are, not what the model computes: dense W of the GGUF with its adapter, through the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_checkpoints import IDS, gguf_checkpoint, gguf_config, relative

from fbiedge.exporters.gguf import exactness
from fbiedge.exporters.gguf.fold import flip_columns
from fbiedge.exporters.gguf.folded import DenseWeights, FoldedModel
from fbiedge.reference import Reference
from fbiedge.weights import Weights

HALF = 2.0**-11  # the relative error of a number in fp16


def folded(weights: Weights) -> FoldedModel:
    return FoldedModel(weights=weights, folds=exactness(weights).folds, fitted={})


def logits(weights: Weights) -> np.ndarray:
    return Reference(weights, np.float64).logits(IDS)


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("row", {}),
        ("single", {}),
        ("block", {}),
        ("column", {}),
        ("column", {"num_key_value_heads": 4}),
        ("column", {"num_key_value_heads": 1, "intermediate_size": 256}),
        ("column", {"model_type": "qwen3"}),
    ],
)
def test_the_model_is_the_same(tmp_path: Path, pattern: Any, changes: dict[str, Any]) -> None:
    """To the rounding of d, which goes through 14 linears."""
    weights = gguf_checkpoint(tmp_path, gguf_config(pattern, **changes))
    assert exactness(weights).exact
    model, expected = folded(weights), logits(weights)
    assert relative(logits(DenseWeights(model=model)), expected) < 10 * HALF
    if pattern != "block":  # beta counts
        assert relative(logits(DenseWeights(model=model, adapter=False)), expected) > 100 * HALF


def test_without_rounding_it_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fbiedge.exporters.gguf import folded as module

    monkeypatch.setattr(module, "half", lambda values, _name: values)
    weights = gguf_checkpoint(tmp_path, gguf_config())
    assert relative(logits(DenseWeights(model=folded(weights))), logits(weights)) < 1e-6


def test_all_but_v_and_up_have_scales_of_one(tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path, gguf_config())
    model = folded(weights)
    for name in weights.config.linear_shapes():
        d = model.linear(f"model.layers.0.{name}").d
        assert (d == 1).all() == (name not in ("self_attn.v_proj", "mlp.up_proj")), name


def edited(name: str, change: Any) -> Any:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        change(tensors[f"model.layers.1.{name}_proj.wscale"])

    return edit


@pytest.mark.parametrize(
    ("name", "lossy"),
    [
        ("self_attn.q", ["q", "k", "v"]),
        ("self_attn.v", ["q", "k", "v"]),
        ("mlp.up", ["gate", "up"]),
        ("self_attn.o", ["o"]),  # 4 heads, 2 KV heads
        ("mlp.down", []),
    ],
)
def test_exactness_is_of_the_data(tmp_path: Path, name: str, lossy: list[str]) -> None:
    """One bit of one scale decides."""

    def nudge(alpha: np.ndarray) -> None:
        alpha[0, 5] = np.nextafter(alpha[0, 5], np.float32(np.inf))

    found = exactness(gguf_checkpoint(tmp_path, gguf_config(), edit=edited(name, nudge)))
    assert [path.split(".")[-1].removesuffix("_proj") for path in found.lossy] == lossy
    assert all(path.startswith("model.layers.1.") for path in found.lossy)


def test_a_sign_is_no_loss(tmp_path: Path) -> None:
    """It goes into the bits."""
    weights = gguf_checkpoint(tmp_path, gguf_config(), edit=edited("self_attn.k", lambda alpha: alpha.__imul__(-1)))
    assert exactness(weights).exact
    assert relative(logits(DenseWeights(model=folded(weights))), logits(weights)) < 10 * HALF


@pytest.mark.parametrize("name", ["self_attn.o", "mlp.down", "self_attn.q"])
def test_scales_of_zero(tmp_path: Path, name: str) -> None:
    """Nothing can be divided by them, so they become tiny ones; a column of beta alone remains."""

    def clear(tensors: dict[str, np.ndarray]) -> None:
        shared = ("self_attn.q", "self_attn.k", "self_attn.v") if name == "self_attn.q" else (name,)
        for one in shared:
            tensors[f"model.layers.1.{one}_proj.wscale"][0, [3, 35]] = 0
            tensors[f"model.layers.1.{one}_proj.wscale"][0, [67, 99]] = 0

    weights = gguf_checkpoint(tmp_path, gguf_config(), edit=clear)
    model = folded(weights)
    assert exactness(weights).exact and model.folds[0].clamped == 0 and model.folds[1].clamped == 4
    assert relative(logits(DenseWeights(model=model)), logits(weights)) < 10 * HALF


def test_flipped_columns() -> None:
    packed = np.array([[0b1010, 1], [0, 0]], np.uint8)
    columns = np.array([True, False, False, True, *[False] * 6])
    assert flip_columns(packed, columns).tolist() == [[0b0011, 1], [0b1001, 0]]
