"""Whole models as GGUF files, laid out for llama.cpp by plain loops: what our reader is to undo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fbiedge.config import ModelConfig
from fbiedge.gguf_model import gguf_name
from fbiedge.weights import expected_shapes

from .gguf_files import Blocks, q1_0_blocks, write_gguf

NO_TOKENIZER = {"tokenizer.ggml.model": "no_vocab"}


def model_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys that llama.cpp needs, without a tokenizer."""
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type in ("linear", "yarn"):
        keys["rope.scaling.type"] = scaling.rope_type
        keys["rope.scaling.factor"] = scaling.factor
        if scaling.rope_type == "yarn":
            keys["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    return {
        "general.architecture": config.model_type,
        **NO_TOKENIZER,
        **{f"{config.model_type}.{key}": value for key, value in keys.items()},
    }


def dense_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """W_eff of every tensor by its official name; binary linears have d = ±fp16 a row and 128 inputs."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_shapes(replace(config, scaling_pattern="none")).items():
        values = generator.normal(1.0, 0.3, shape) if "norm" in name else generator.normal(0.0, 0.1, shape)
        if "_proj" in name and config.scaling_pattern == "block":
            scales = generator.uniform(0.02, 0.1, (shape[0], shape[1] // 128)).astype(np.float16)
            values = np.where(values >= 0, 1, -1) * np.repeat(scales.astype(np.float32), 128, axis=1)
        tensors[name] = values.astype(np.float32)
    return tensors


def model_tensors(config: ModelConfig, dense: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray | Blocks]:
    """`dense` (or random tensors) as they lie in a GGUF file: linears as Q1_0 for pattern `block`, else float32."""
    tensors: dict[str, np.ndarray | Blocks] = {}
    for name, values in (dense or dense_tensors(config)).items():
        if config.model_type == "llama" and ".q_proj." in name:
            values = interleaved(values, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj." in name:
            values = interleaved(values, config.num_key_value_heads)
        binary = "_proj" in name and config.scaling_pattern == "block"
        tensors[gguf_name(name)] = as_q1_0(values) if binary else values
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "factors":
        tensors["rope_freqs.weight"] = np.array(config.rope_scaling.factors, np.float32)
    return tensors


def as_q1_0(values: np.ndarray) -> Blocks:
    """Values of one magnitude a block."""
    return q1_0_blocks(values, np.abs(values[:, ::128]))


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head, halves of pairs, -> pairs side by side: llama.cpp turns rows 2i and 2i + 1 together."""
    head_dim = len(weight) // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for pair in range(head_dim // 2):
            for half in range(2):
                out[head * head_dim + 2 * pair + half] = weight[head * head_dim + half * (head_dim // 2) + pair]
    return out


def write_model(path: Path, config: ModelConfig, metadata: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """A random model at `path` -> its dense tensors by their official names."""
    dense = dense_tensors(config)
    write_gguf(path, model_metadata(config) | (metadata or {}), model_tensors(config, dense))
    return dense
