"""Small checkpoints that GGUF can hold: hidden 128, so that blocks of 128 fill its rows, and a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fbiedge.config import ModelConfig, ScalingPattern
from fbiedge.initialize import byte_tokenizer
from fbiedge.weights import Weights, open_checkpoint, write_checkpoint

from .checkpoints import Tensors, small_config, small_tensors

IDS = [1, 70, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 2, 1, 200, 201, 5]
FILES = {
    "tokenizer.json": byte_tokenizer(),
    "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}


def gguf_config(pattern: ScalingPattern = "column", **changes: Any) -> ModelConfig:
    """2 layers, hidden 128, FFN 200 (256 in GGUF), 4 heads of 32, 2 KV heads, 259 tokens and 5 rows to spare."""
    sizes = {"vocab_size": 264, "hidden_size": 128, "intermediate_size": 200, "num_attention_heads": 4, "head_dim": 32}
    return small_config(pattern, **(sizes | changes))


def share_scales(tensors: Tensors, config: ModelConfig) -> None:
    """Make a `column` checkpoint exactly exportable: one alpha for q, k, v, one for gate and up, and in o one for the
    query heads of a group."""
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for first, *others in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            for other in others:
                tensors[f"{prefix}{other}_proj.wscale"] = tensors[f"{prefix}{first}_proj.wscale"].copy()
        alpha = tensors[f"{prefix}self_attn.o_proj.wscale"].reshape(config.num_key_value_heads, -1, config.head_dim)
        alpha[:] = alpha[:, :1]


def gguf_checkpoint(
    folder: Path, config: ModelConfig, *, shared: bool = True, files: dict[str, str] | None = None, edit: Any = None
) -> Weights:
    """A checkpoint folder, opened. Activations stay about as large as they come in, as in trained models."""
    tensors = small_tensors(config)
    for name, tensor in tensors.items():
        if name.endswith("wscale"):
            tensor *= 0.3
            tensor[..., ::7] *= -1  # trained scales change their sign here and there
        elif name.endswith("wbias"):
            tensor *= 0.1
    if shared and config.scaling_pattern == "column":
        share_scales(tensors, config)
    if edit is not None:
        edit(tensors)
    write_checkpoint(folder, config, tensors.items(), FILES if files is None else files)
    return open_checkpoint(folder)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())
