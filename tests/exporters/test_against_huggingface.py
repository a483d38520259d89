"""Exported models compute what Hugging Face's Llama or Qwen3 computes with the dense W_eff: prefill, 32 decode steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import PATTERNS, small_config
from support.huggingface import HuggingFaceLlama
from support.onnx_llama import OnnxLlama
from support.rope import HEAD_DIM, SCALINGS, THETA

from fbiedge.config import ModelConfig, ScalingPattern
from fbiedge.exporters.onnx import export_onnx
from fbiedge.weights import Weights

MakeWeights = Callable[[ModelConfig], Weights]
PREFILL, DECODE = 9, 32


def both(candidate: OnnxLlama, reference: HuggingFaceLlama) -> tuple[np.ndarray, np.ndarray]:
    """Logits of each over a prefill, a second prefill behind it, and 32 decode steps, through the cache in place."""
    generator = np.random.default_rng(5)
    texts = [
        generator.integers(0, candidate.config.vocab_size, length).tolist() for length in (PREFILL, 4, *[1] * DECODE)
    ]
    return np.concatenate([candidate.logits(ids) for ids in texts]), np.concatenate(
        [reference.logits(ids) for ids in texts]
    )


def assert_equal(candidate: OnnxLlama, reference: HuggingFaceLlama) -> None:
    """To fp32 rounding: 41 products of up to 172 terms in a row leave some 5e-6 of the largest logit."""
    got, expected = both(candidate, reference)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kv_heads", [6, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_fp32_level_equals_hugging_face(
    pattern: ScalingPattern, kv_heads: int, library: Path | None, make_weights: MakeWeights, tmp_path: Path
) -> None:
    weights = make_weights(small_config(pattern, head_dim=16, num_key_value_heads=kv_heads))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, accuracy_level="fp32", head="fp32", kv_cache="fp32", block_scales="fp32")
    assert_equal(OnnxLlama(path, weights.config, library), HuggingFaceLlama(weights))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_int8_level_stays_near_hugging_face(
    pattern: ScalingPattern, library: Path | None, make_weights: MakeWeights, tmp_path: Path
) -> None:
    """The bound is for this model, whose random weights amplify errors; what a trained one loses, verify_export says."""
    weights = make_weights(small_config(pattern, head_dim=16))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path)
    got, expected = both(OnnxLlama(path, weights.config, library), HuggingFaceLlama(weights))
    noise = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 1e-4 < noise < 0.08


@pytest.mark.parametrize("head_dim", [8, 24])
def test_head_sizes_that_attention_can_not_rotate(
    head_dim: int, library: Path | None, make_weights: MakeWeights, tmp_path: Path
) -> None:
    weights = make_weights(small_config("column", head_dim=head_dim))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, accuracy_level="fp32", head="fp32", kv_cache="fp32")
    assert_equal(OnnxLlama(path, weights.config, library), HuggingFaceLlama(weights))


QWEN3 = {"model_type": "qwen3", "tie_word_embeddings": True}
QWEN3_SHAPES = {  # KV heads, heads, size; of 1.7B and 4B: two or four queries a KV head, heads of 128, hidden apart
    "gqa2-128": {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 128},
    "gqa4-32": {"num_key_value_heads": 1, "num_attention_heads": 4, "head_dim": 32},
    "unfused-rope": {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 24},
}


@pytest.mark.parametrize("pattern", ["block", "column", "none"])
@pytest.mark.parametrize("shape", QWEN3_SHAPES)
def test_qwen3(
    shape: str, pattern: ScalingPattern, library: Path | None, make_weights: MakeWeights, tmp_path: Path
) -> None:
    """Heads of queries and keys are normalised by stock operators around ONNX Runtime's own attention."""
    weights = make_weights(small_config(pattern, **QWEN3, **QWEN3_SHAPES[shape]))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, accuracy_level="fp32", head="fp32", kv_cache="fp32", block_scales="fp32")
    assert_equal(OnnxLlama(path, weights.config, library), HuggingFaceLlama(weights))


@pytest.mark.parametrize("shape", ["gqa2-128", "gqa4-32"])
def test_qwen3_with_an_int8_cache(shape: str, library: Path | None, make_weights: MakeWeights, tmp_path: Path) -> None:
    """Our attention normalises them itself, and so does its body in stock operators; the cache's rounding is lost."""
    weights = make_weights(small_config("block", **QWEN3, **QWEN3_SHAPES[shape]))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, accuracy_level="fp32", head="fp32", kv_cache="int8", block_scales="fp32")
    got, expected = both(OnnxLlama(path, weights.config, library), HuggingFaceLlama(weights))
    noise = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 1e-5 < noise < 0.03, noise


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "none"])
def test_rope_scaling(
    scaling: str, model_type: str, library: Path | None, make_weights: MakeWeights, tmp_path: Path
) -> None:
    """Beyond the original context of 16 or 32 positions."""
    rope = {"head_dim": HEAD_DIM, "rope_theta": THETA, "rope_scaling": SCALINGS[scaling]}
    weights = make_weights(small_config("block", model_type=model_type, **rope))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, accuracy_level="fp32", head="fp32", kv_cache="fp32", block_scales="fp32")
    assert_equal(OnnxLlama(path, weights.config, library), HuggingFaceLlama(weights))


def test_tied_head_is_the_embedding(library: Path | None, make_weights: MakeWeights, tmp_path: Path) -> None:
    weights = make_weights(small_config("row", head_dim=16, tie_word_embeddings=True))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, accuracy_level="fp32", head="fp32", kv_cache="fp32")
    assert_equal(OnnxLlama(path, weights.config, library), HuggingFaceLlama(weights))
