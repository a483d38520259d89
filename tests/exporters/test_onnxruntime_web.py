"""What is exported runs in onnxruntime-web: its WebAssembly build under node computes what the numpy reference does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import npm
from support.checkpoints import small_config
from support.random_weights import random_weights

from fbiedge.config import ModelConfig
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.reference import Reference
from fbiedge.weights import Weights

SOURCE = Path(__file__).resolve().parents[1] / "support" / "onnxruntime_web"
EXACT: dict[str, Any] = {"accuracy_level": "fp32", "head": "fp32", "block_scales": "fp32"}
RUNS = ([3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5])


@pytest.fixture(scope="module")
def web() -> Path:
    """The folder with onnxruntime-web."""
    return npm.installed(SOURCE)


def in_web(web: Path, model: Path) -> np.ndarray:
    """The logits after each of RUNS."""
    command = ["node", "logits.mjs", str(model), *(",".join(map(str, ids)) for ids in RUNS)]
    done = subprocess.run(command, cwd=web, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout), np.float32)


def expected(weights: Weights) -> np.ndarray:
    reference = Reference(weights)
    return np.array([reference.logits(ids)[-1] for ids in RUNS])


@pytest.mark.parametrize(
    "form",
    [
        {"operators": "stock", "stock_bits": 1, **EXACT},
        {"operators": "stock", "stock_bits": 4, **EXACT},
        {"kv_cache": "fp32", **EXACT},  # our operators, by their bodies
    ],
    ids=["stock-1", "stock-4", "ours"],
)
@pytest.mark.parametrize("pattern", ["column", "row", "single", "block"])
def test_logits_equal_the_reference(
    pattern: Any, form: dict[str, Any], web: Path, make_weights: Callable[[ModelConfig], Weights], tmp_path: Path
) -> None:
    weights, path = make_weights(small_config(pattern, head_dim=16)), tmp_path / "model.onnx"
    export_onnx(weights, path, **form)
    wanted = expected(weights)
    np.testing.assert_allclose(in_web(web, path), wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [1, 4])
def test_a_tied_qwen3_of_1_bit(bits: Any, web: Path, tmp_path: Path) -> None:
    config = small_config("block", head_dim=16, hidden_size=128, model_type="qwen3", tie_word_embeddings=True)
    weights, path = random_weights(config, binary_head=True), tmp_path / "model.onnx"
    export_onnx(weights, path, operators="stock", stock_bits=bits, accuracy_level="fp32")
    wanted = expected(weights)
    np.testing.assert_allclose(in_web(web, path), wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("embedding", "tied", "form"),
    [("int8", False, {}), ("int4", False, {}), ("int4", True, {}), ("int8", True, {"operators": "stock"})],
    ids=["int8", "int4", "tied-int4", "tied-int8-stock"],
)
def test_a_quantised_embedding(
    embedding: Any,
    tied: bool,
    form: dict[str, Any],
    web: Path,
    make_weights: Callable[[ModelConfig], Weights],
    tmp_path: Path,
) -> None:
    """Tied and of our operators, it is read out of the head's tiles."""
    weights = make_weights(small_config(head_dim=16, tie_word_embeddings=tied))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, embedding=embedding, head=embedding, accuracy_level="fp32", kv_cache="fp32", **form)
    wanted = expected(open_onnx(path))
    np.testing.assert_allclose(in_web(web, path), wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_an_int8_head(web: Path, make_weights: Callable[[ModelConfig], Weights], tmp_path: Path) -> None:
    """Close, and not equal: the head is rounded."""
    weights, path = make_weights(small_config(head_dim=16)), tmp_path / "model.onnx"
    export_onnx(weights, path, operators="stock", stock_bits=1, head="int8")
    wanted = expected(weights)
    np.testing.assert_allclose(in_web(web, path), wanted, rtol=0, atol=0.02 * np.abs(wanted).max())
