"""From GGUF to ONNX: the same logits as without the way round, and as llama.cpp computes of the file itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import small_config
from support.gguf_checkpoints import IDS, gguf_checkpoint, gguf_config
from support.gguf_files import write_gguf
from support.gguf_models import as_q1_0, dense_tensors, model_metadata, model_tensors
from support.q8_0 import RoundedReference
from support.stock_llama_cpp import StockLlamaCpp

from fbiedge.exporters.gguf import export_gguf, open_gguf
from fbiedge.exporters.onnx import export_onnx
from fbiedge.llama_cpp_session import LlamaCppSession
from fbiedge.model_file import ModelFile
from fbiedge.reference import Reference
from fbiedge.rope import RopeScaling
from fbiedge.session import Session
from fbiedge.weights import Weights

EXACT: dict[str, Any] = {"accuracy_level": "fp32", "kv_cache": "fp32"}


def onnx_logits(weights: Weights, path: Path, ids: list[int], **options: Any) -> np.ndarray:
    export_onnx(weights, path, **(EXACT | options))
    return Session.open(path, threads=1).all_logits(ids)


@pytest.mark.parametrize("pattern", ["column", "block"])
def test_by_way_of_gguf_to_onnx(pattern: Any, tmp_path: Path) -> None:
    """An exactly exportable checkpoint: scales that shared a place in the file come back without a loss."""

    def to_fp16(tensors: dict[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            if "wscale" in name and pattern == "block":
                tensors[name] = tensor.astype(np.float16).astype(np.float32)

    weights = gguf_checkpoint(tmp_path / "checkpoint", gguf_config(pattern), edit=to_fp16)
    export_gguf(weights, tmp_path / "model.gguf", embedding="f32", head="f32")
    straight = onnx_logits(weights, tmp_path / "straight.onnx", IDS, head="fp32", embedding="fp32")
    back = open_gguf(tmp_path / "model.gguf")
    round_about = onnx_logits(back, tmp_path / "round.onnx", IDS, head="fp32", embedding="fp32")
    np.testing.assert_allclose(round_about, straight, atol=1e-5 * np.abs(straight).max())
    # The tokenizer came along, and gives the same ids.
    assert ModelFile.open(tmp_path / "round.onnx").metadata["tokenizer"]


def test_a_qwen_of_1_bit(tmp_path: Path) -> None:
    """Qwen3's layout: 16 heads over 8, of 128, norms of heads, head_dim other than hidden / heads, the head tied.

    llama.cpp multiplies Q1_0 with activations of 8 bits, so it gets the same weights in float32, too. With that rounding
    our logits are its own, to the bit for most first tokens; a difference in the last place of anything before may round
    to another code, which is why no more tokens are compared so.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "model_type": "qwen3", "tie_word_embeddings": True,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    config = small_config("block", **sizes)
    dense = dense_tensors(config)
    embedding = dense["model.embed_tokens.weight"]
    dense["model.embed_tokens.weight"] = np.where(embedding >= 0, 0.125, -0.125).astype(np.float32)
    tensors = model_tensors(config, dense) | {"token_embd.weight": as_q1_0(dense["model.embed_tokens.weight"])}
    one_bit = write_gguf(tmp_path / "model.gguf", model_metadata(config), tensors)
    plain = replace(config, scaling_pattern="none")
    float32 = write_gguf(tmp_path / "float32.gguf", model_metadata(plain), model_tensors(plain, dense))

    ids = np.random.default_rng(0).integers(0, 1000, 48).tolist()
    ours = onnx_logits(open_gguf(one_bit), tmp_path / "model.onnx", ids)
    metadata = ModelFile.open(tmp_path / "model.onnx").metadata
    assert metadata["head"] == "1bit"
    theirs = LlamaCppSession.open(float32, threads=1).all_logits(ids)
    np.testing.assert_allclose(ours, theirs, atol=3e-3 * np.abs(theirs).max())  # their keys and values are fp16
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).all()
    of_8_bits = LlamaCppSession.open(one_bit, threads=1).all_logits(ids)
    assert np.corrcoef(ours.ravel(), of_8_bits.ravel())[0, 1] > 0.9995
    stock, rounded = StockLlamaCpp(one_bit), RoundedReference(open_gguf(one_bit))  # with a cache of float32
    errors = []
    for token in ids[:16]:
        rounded.reset()
        expected = rounded.logits([token])
        errors.append(np.abs(stock.logits([token]) - expected).max() / np.abs(expected).max())
    stock.close()
    assert np.median(errors) < 1e-6 and max(errors) < 0.02


@pytest.mark.parametrize(
    "key",
    [
        "attention.scale",
        *(
            f"rope.scaling.yarn_{part}"
            for part in ("beta_fast", "beta_slow", "ext_factor", "attn_factor", "log_multiplier")
        ),
        "rope.scaling.alpha",
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_keys_that_llama_cpp_ignores_change_nothing(model_type: Any, key: str, tmp_path: Path) -> None:
    """Chat runs the file, the import converts it: they must be one model, also beyond the original context."""
    yarn = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    config = small_config("none", model_type=model_type, head_dim=32, rope_scaling=yarn, num_hidden_layers=1)
    dense = dense_tensors(config)
    for name in dense:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            dense[name] *= 4  # attention that looks at positions
    metadata = model_metadata(config) | {f"{model_type}.{key}": 1.5 if key.endswith("beta_fast") else 0.5}
    path = write_gguf(tmp_path / "model.gguf", metadata, model_tensors(config, dense))

    ids = np.random.default_rng(1).integers(0, 80, 60).tolist()
    ours = Reference(open_gguf(path)).logits(ids)
    theirs = LlamaCppSession.open(path, threads=1).all_logits(ids)
    np.testing.assert_allclose(ours, theirs, atol=3e-3 * np.abs(theirs).max())  # their keys and values are fp16
