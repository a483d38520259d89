"""A tiny random model.onnx with the byte tokenizer, for whatever runs a model and doesn't care what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fbiedge.exporters.onnx import export_onnx
from fbiedge.initialize import byte_tokenizer
from fbiedge.weights import open_checkpoint, write_checkpoint

from .checkpoints import small_config, small_tensors

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tiny_checkpoint(
    folder: Path, *, chat_template: str | None = None, generation_config: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """A checkpoint folder: 259 tokens of bytes, context 64, heads of 16; `changes` to the config."""
    config = small_config(**({"vocab_size": 259, "head_dim": 16} | changes))
    tokenizer_config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    files = {"tokenizer.json": byte_tokenizer(), "tokenizer_config.json": json.dumps(tokenizer_config)}
    if generation_config is not None:
        files["generation_config.json"] = json.dumps(generation_config)
    write_checkpoint(folder, config, small_tensors(config).items(), files)
    return folder


def tiny_model(folder: Path, *, export: dict[str, Any] | None = None, **checkpoint: Any) -> Path:
    """model.onnx in `folder`, exact (fp32 head, activations and cache) unless `export` says otherwise."""
    weights = open_checkpoint(tiny_checkpoint(folder / "checkpoint", **checkpoint))
    path = folder / "model.onnx"
    export_onnx(weights, path, **({"accuracy_level": "fp32", "head": "fp32", "kv_cache": "fp32"} | (export or {})))
    return path
