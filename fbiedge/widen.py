"""A wider binary model that computes the same: `fbiedge widen MODEL -o DIR`, for `fbiedge train --init DIR` to go on from.

Every hidden unit, attention head and MLP unit stands there `factor` times. What reads them has `factor` times the inputs, at
scales divided by `factor`, so all logits stay, but for rounding. Signs are factor² times as many; embedding and output head
grow by the factor. Copies that learned alike would stay copies for ever: each latent's distance from zero is therefore drawn
anew around what it was, which changes no sign, and copies of one sign flip at different steps. Then they are together a weight
of factor + 1 levels.

The idea is that of Net2WiderNet (Chen, Goodfellow and Shlens, arXiv 1511.05641), whose copies come apart by noise too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .config import BLOCK_SIZE, ModelConfig
from .errors import UsageError
from .weights import Weights, expected_shapes, open_checkpoint, write_checkpoint

_SPREAD = 0.5  # a copy's latent is the original's, times 0.5 to 1.5


def widen(model: Path, out: Path, factor: int = 2, seed: int = 0) -> ModelConfig:
    """Write the model of the checkpoint folder `model`, `factor` times as wide, to `out`, and return its shape.

    The same seed gives the same latents. Raises CheckpointError, OutputError, and UsageError for a model without signs,
    whose copies nothing would tell apart, for blocks that a copy would begin in the middle of, and for what can't be trained.
    """
    source = open_checkpoint(model)
    config = source.config
    if factor < 2:
        raise UsageError(f"the factor is {factor}, expected 2 or more")
    if config.scaling_pattern == "none":
        raise UsageError(f"{model} is full precision, expected a binary model; name a student")
    config.check_trainable(str(model))
    inputs = {k for _, k in config.linear_shapes().values()}
    if config.scaling_pattern == "block" and (uneven := sorted(k for k in inputs if k % BLOCK_SIZE)):
        raise UsageError(
            f"{model} has linears of {uneven[0]} inputs, expected a multiple of {BLOCK_SIZE}: a copy would begin within a "
            f"block; train on with --scaling-pattern column first"
        )
    wide = replace(
        config,
        hidden_size=config.hidden_size * factor,
        intermediate_size=config.intermediate_size * factor,
        num_attention_heads=config.num_attention_heads * factor,
        num_key_value_heads=config.num_key_value_heads * factor,
    )
    write_checkpoint(out, wide, _tensors(source, wide, factor, np.random.default_rng(seed)), source.files)
    return wide


def _tensors(
    source: Weights, wide: ModelConfig, factor: int, random: np.random.Generator
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    # The output head reads copies as every linear does; one that is tied to the embedding leaves that to the norm before it.
    last = "model.norm.weight" if wide.tie_word_embeddings else "lm_head.weight"
    for name, shape in expected_shapes(wide).items():
        tensor = source.tensor(name)
        copies = np.tile(tensor, [new // old for new, old in zip(shape, tensor.shape, strict=True)])
        if name.endswith("_proj.weight"):
            copies = _spread(copies, random)
        elif name.endswith((".wscale", ".wbias")) or name == last:
            copies /= factor
        yield name, copies


def _spread(latents: npt.NDArray[np.float32], random: np.random.Generator) -> npt.NDArray[np.float32]:
    """The latents at other distances from zero, on the side they are on; 0 is on the positive one."""
    distances = np.abs(latents)
    distances *= random.random(latents.shape, dtype=np.float32) * 2 * _SPREAD + (1 - _SPREAD)
    np.maximum(distances, np.finfo(np.float32).tiny, out=distances)
    return np.where(latents >= 0, distances, -distances)
