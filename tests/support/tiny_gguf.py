"""A tiny random full-precision Llama with a tokenizer, as GGUF and as a checkpoint, and an adapter for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fbiedge.config import ModelConfig
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_tokenizer import sidecars_from_gguf
from fbiedge.weights import write_checkpoint

from .checkpoints import Tensors, small_config, small_tensors
from .gguf_files import write_gguf
from .gguf_models import model_metadata, model_tensors

HASH = "0" * 63 + "1"


def tiny_config(**changes: Any) -> ModelConfig:
    """2 layers, hidden 64, FFN 96, 4 heads of 16, 2 KV heads, 260 tokens, context 64, no binary layers."""
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    return small_config("none", **(sizes | changes))


def tiny_gguf(
    folder: Path,
    *,
    named: Tensors | None = None,
    metadata: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """model.gguf in `folder`, and the same as `checkpoint`, unless tensors or metadata are said.

    `named`: tensors by llama.cpp's names. `metadata`: None leaves a key out.
    """
    config = tiny_config(**changes)
    tensors = small_tensors(config)
    entries = model_metadata(config) | byte_vocabulary(config.vocab_size) | (metadata or {})
    entries = {key: value for key, value in entries.items() if value is not None}
    path = write_gguf(folder / "model.gguf", entries, named or gguf_tensors(config, tensors))
    if named is metadata is None:
        files = sidecars_from_gguf(GgufFile.open(path).metadata)
        write_checkpoint(folder / "checkpoint", config, tensors.items(), files)
    return path


def gguf_tensors(config: ModelConfig, tensors: Tensors) -> Tensors:
    """`tensors` by llama.cpp's names, in its order of rows."""
    return {name: np.asarray(values) for name, values in model_tensors(config, tensors).items()}


def byte_vocabulary(size: int = 260) -> dict[str, Any]:
    """Metadata of a tokenizer of bytes, with one merge because there must be one; <s> opens a text."""
    from tokenizers import pre_tokenizers

    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *(f"<extra{i}>" for i in range(size - len(tokens)))],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (size - 3),
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def tiny_adapter(path: Path, *, beta_of: str | None = HASH, a: np.ndarray | None = None, **metadata: Any) -> Path:
    """A rank-1 LoRA of the first layer's up_proj, as our exporter writes beside a model; `a` [1, hidden] instead of it."""
    generator = np.random.default_rng(0)
    config = tiny_config()
    entries = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0,
        **({} if beta_of is None else {"fbiedge.beta_of": beta_of}), **metadata,
    }  # fmt: skip
    a = generator.normal(0, 1, (1, config.hidden_size)).astype(np.float32) if a is None else a
    b = generator.normal(0, 1, (config.intermediate_size, 1)).astype(np.float32)
    return write_gguf(path, entries, {"blk.0.ffn_up.weight.lora_a": a, "blk.0.ffn_up.weight.lora_b": b})
