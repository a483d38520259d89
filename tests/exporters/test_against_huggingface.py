"""Exported models compute what Hugging Face's Llama computes with the dense W_eff: prefill and 32 decode steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import PATTERNS, small_config
from support.huggingface import HuggingFaceLlama
from support.onnx_llama import OnnxLlama

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


def test_tied_head_is_the_embedding(library: Path | None, make_weights: MakeWeights, tmp_path: Path) -> None:
    weights = make_weights(small_config("row", head_dim=16, tie_word_embeddings=True))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, accuracy_level="fp32", head="fp32", kv_cache="fp32")
    assert_equal(OnnxLlama(path, weights.config, library), HuggingFaceLlama(weights))
