"""Small random checkpoints whose sizes are not round, so that a mixed-up axis can't go unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fbiedge.config import ModelConfig, ScalingPattern
from fbiedge.initialize import xnor_scales
from fbiedge.weights import BinaryLinear, Weights, expected_shapes, write_checkpoint

PATTERNS: tuple[ScalingPattern, ...] = ("column", "row", "single", "block", "none")

Tensors = dict[str, np.ndarray]


def small_config(pattern: ScalingPattern = "column", **changes: Any) -> ModelConfig:
    """2 layers, hidden 72, FFN 172 (block: 2 groups, the last of 44), 6 heads of 12, 2 KV heads, vocabulary 80."""
    sizes: dict[str, Any] = {
        "vocab_size": 80,
        "hidden_size": 72,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 64,
        "scaling_pattern": pattern,
    }
    return ModelConfig(**(sizes | changes))


def small_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """Tensors whose every part counts: norms away from 1, scales and offsets that differ, latents large enough to matter."""
    generator = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, shape in expected_shapes(config).items():
        if name in tensors:
            continue
        tensors[name] = generator.normal(1.0 if "norm" in name else 0.0, 0.3, shape).astype(np.float32)
        if "_proj" in name and config.scaling_pattern != "none":
            stem = name.removesuffix("weight")
            alpha, beta = xnor_scales(tensors[name], config.scaling_pattern)
            tensors[f"{stem}wscale"] = alpha * generator.uniform(0.5, 1.5, alpha.shape).astype(np.float32)
            if beta is not None:
                tensors[f"{stem}wbias"] = beta + generator.normal(0, 0.05, beta.shape).astype(np.float32)
    return tensors


def small_checkpoint(
    out: Path, config: ModelConfig, *, edit: Callable[[Tensors], object] = lambda tensors: None, **options: Any
) -> Tensors:
    """Write a small checkpoint to `out`, after `edit` changed its tensors in place; returns what was written."""
    tensors = small_tensors(config)
    edit(tensors)
    write_checkpoint(out, config, tensors.items(), {}, **options)
    return tensors


def dense(weights: Weights, name: str) -> np.ndarray:
    """W_eff [N, K] of a linear, binary or not."""
    linear = weights.linear(name)
    return linear.dense() if isinstance(linear, BinaryLinear) else linear
