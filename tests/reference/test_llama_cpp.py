"""The numpy reference equals llama.cpp on the same float32 weights: Llama and Qwen3, tied, and every RoPE scaling.

llama.cpp keeps no list of definitions; this is what says that Hugging Face's (tests/core/test_rope.py) are its own too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import Tensors, small_config, small_tensors
from support.gguf_files import write_gguf
from support.gguf_models import model_metadata
from support.rope import HEAD_DIM, SCALINGS, THETA
from support.stock_llama_cpp import StockLlamaCpp
from support.tiny_gguf import byte_vocabulary, gguf_tensors

from fbiedge.config import ModelConfig
from fbiedge.reference import Reference
from fbiedge.rope import RopeScaling, rope_frequencies
from fbiedge.weights import open_checkpoint, write_checkpoint

IDS = np.random.default_rng(1).integers(0, 260, 48).tolist()  # three times the original context of support.rope
FP32_ROUNDING = 2e-5  # of the largest logit; ggml's angles are float32, and grow with the position


def config_of(model_type: str, **changes: Any) -> ModelConfig:
    """2 layers, hidden 64, FFN 96, 6 heads of 16 over 2 KV heads: heads are more than hidden."""
    sizes: dict[str, Any] = {
        "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "head_dim": HEAD_DIM, "rope_theta": THETA,
        "model_type": model_type,
    }  # fmt: skip
    return small_config("none", **(sizes | changes))


def metadata_of(config: ModelConfig, **rope: Any) -> dict[str, Any]:
    stated = {f"{config.model_type}.rope.scaling.{key}": value for key, value in rope.items()}
    return {**model_metadata(replace(config, rope_scaling=None)), **byte_vocabulary(config.vocab_size), **stated}


def named_tensors(config: ModelConfig, tensors: Tensors) -> Tensors:
    """By llama.cpp's names. A Qwen3 is rotated in halves there too, so its rows are as they are."""
    tensors = {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}
    named = gguf_tensors(config, tensors)
    if config.model_type == "qwen3":
        for layer in range(config.num_hidden_layers):
            for part in "qk":
                prefix = f"model.layers.{layer}.self_attn.{part}"
                named[f"blk.{layer}.attn_{part}.weight"] = tensors[f"{prefix}_proj.weight"]
                named[f"blk.{layer}.attn_{part}_norm.weight"] = tensors[f"{prefix}_norm.weight"]
    if config.tie_word_embeddings:
        del named["output.weight"]
    return named


def both(folder: Path, config: ModelConfig, rope: dict[str, Any], extra: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the reference and of llama.cpp."""
    tensors = small_tensors(config)
    write_checkpoint(folder / "checkpoint", config, tensors.items(), {})
    named = named_tensors(config, tensors) | extra
    path = write_gguf(folder / "model.gguf", metadata_of(config, **rope), named)
    llama_cpp = StockLlamaCpp(path)
    theirs = llama_cpp.logits(IDS)
    llama_cpp.close()
    return Reference(open_checkpoint(folder / "checkpoint")).logits(IDS), theirs


def assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=FP32_ROUNDING * np.abs(ours).max())


def in_gguf(scaling: RopeScaling) -> tuple[dict[str, Any], Tensors]:
    """Keys below rope.scaling, and tensors. What has no keys that llama.cpp reads is divisors of the frequencies."""
    if scaling.rope_type == "linear":
        return {"type": "linear", "factor": scaling.factor}, {}
    if scaling == SCALINGS["yarn"]:
        original = scaling.original_max_position_embeddings
        return {"type": "yarn", "factor": scaling.factor, "original_context_length": original}, {}
    plain, scaled = (rope_frequencies(HEAD_DIM, THETA, one) for one in (None, scaling))
    return {"attn_factor": scaling.magnitude}, {"rope_freqs.weight": (plain / scaled).astype(np.float32)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_same_architecture(model_type: str, tied: bool, tmp_path: Path) -> None:
    assert_equal(*both(tmp_path, config_of(model_type, tie_word_embeddings=tied), {}, {}))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *(("llama", name) for name in SCALINGS if name != "none"),
        *(("qwen3", name) for name in ("linear", "yarn")),  # llama.cpp reads no divisors of a Qwen3
    ],
)
def test_same_scaling(model_type: str, name: str, tmp_path: Path) -> None:
    scaling = SCALINGS[name]
    assert scaling is not None
    assert_equal(*both(tmp_path, config_of(model_type, rope_scaling=scaling), *in_gguf(scaling)))


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("key", ["yarn_attn_factor", "yarn_ext_factor", "yarn_beta_fast", "yarn_beta_slow"])
def test_llama_cpp_ignores_details_of_yarn(key: str, model_type: str, tmp_path: Path) -> None:
    """Its own converter writes them, but only other architectures read them: 32, 1 and 1 + ln(factor) / 10 it is."""
    plain = SCALINGS["yarn"]
    assert plain is not None
    keys, tensors = in_gguf(plain)
    assert_equal(*both(tmp_path, config_of(model_type, rope_scaling=plain), {**keys, key: 0.5}, tensors))


def test_llama_cpp_multiplies_its_factor_by_an_attn_factor(tmp_path: Path) -> None:
    plain = SCALINGS["yarn"]
    assert plain is not None
    keys, tensors = in_gguf(plain)
    config = config_of("qwen3", rope_scaling=replace(plain, attention_factor=1.25 * plain.magnitude))
    assert_equal(*both(tmp_path, config, {**keys, "attn_factor": 1.25}, tensors))
