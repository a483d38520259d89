"""What a model file stores: each tensor's name, dtype, shape and group are known before any weight is read.

Names are the checkpoint's, with the part after the last dot saying what is stored:

    model.embed_tokens.weight                     float32 or float16 [vocab, hidden]
    model.embed_tokens.bits, .alpha               1-bit embedding, as the .bits and .alpha of form block below
    model.embed_tokens.codes, .scales             int8 or int4 embedding: uint8 [vocab, ceil(hidden/32), 4 · bits] and
                                                  float16 [vocab, ceil(hidden/32)], see head.py
    model.layers.0.self_attn.q_proj.bits          uint8 [ceil(N/16), ceil(K/32), 64], tiles (fbiedge.bits)
    model.layers.0.self_attn.q_proj.alpha, .beta  float32 (K,) column | (N,) row | (1,) single;
                                                  block: alpha float16 or float32 [ceil(N/16), ceil(K/128), 16]
    model.layers.0.self_attn.q_proj.sign_codes    the same for stock operators: uint8 [N, ceil(K/128), …], see stock.py;
                                                  beside it .alpha and .beta, or .scales float32 of form block
    ones.4096                                     float32, scales of as many blocks of codes
    model.layers.0.self_attn.q_proj.weight        float32 [K, N], of an ordinary Llama (transposed for MatMul)
    model.layers.0.input_layernorm.weight         float32 [hidden]; of self_attn.q_norm and k_norm [head_dim]
    lm_head.bits, .alpha, .bias                   1-bit head, also of form block; zeros
    lm_head.tiles                                 int8 or int4 head: uint8 [ceil(N/16), ceil(K/128), …], see head.py
    lm_head.codes, lm_head.scales                 the same for stock operators; a 1-bit head as q_proj's above
                                                  a tied embedding of the head's form is in the head
    lm_head.weight                                float32 [hidden, vocab], fp32 head (transposed for MatMul)
    rope.cos, rope.sin                            float32 [context, head_dim / 2]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError
from fbiedge.reference import rope_angles
from fbiedge.weights import BinaryLinear, Weights

from .options import ExportOptions
from .sources import Source, TensorSpec, binary_source, plain_source, shaped
from .stock import ones_source, stock_source
from .vocabulary import embedding_source, head_source


@dataclass
class Losses:
    """What the stored form can't hold exactly; complete once every source was read."""

    zeros: int = 0  # latent weights that were exactly 0, stored as +1


def plan_tensors(weights: Weights, options: ExportOptions, losses: Losses) -> Iterator[Source]:
    """All tensors in the order of use, so that a mapped file is read front to back.

    Reading a source raises CheckpointError where a weight doesn't have the config's shape or doesn't fit its dtype.
    """
    config = weights.config
    hidden = config.hidden_size
    yield from embedding_source(weights, options)
    yield _rope_tables(config)
    if options.operators == "stock" and not options.unfolded and config.scaling_pattern not in ("none", "block"):
        ones = [ones_source(n, k) for n, k in config.linear_shapes().values()]
        yield from {source.specs[0].name: source for source in ones}.values()
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield plain_source(weights, f"{prefix}input_layernorm.weight", (hidden,), "norms")
        for name, (n, k) in config.linear_shapes().items():
            if name == "self_attn.o_proj" and config.has_head_norms:
                for part in "qk":
                    yield plain_source(weights, f"{prefix}self_attn.{part}_norm.weight", (config.head_dim,), "norms")
            if name == "mlp.gate_proj":
                yield plain_source(weights, f"{prefix}post_attention_layernorm.weight", (hidden,), "norms")
            group = "attention" if name.startswith("self_attn") else "mlp"
            plan_linear = _dense_linear if config.scaling_pattern == "none" else _binary_linear
            yield plan_linear(weights, f"{prefix}{name}", n, k, group, options, losses)
    yield plain_source(weights, "model.norm.weight", (hidden,), "norms")
    yield from head_source(weights, options)


def _dense_linear(
    weights: Weights, name: str, n: int, k: int, group: str, options: ExportOptions, losses: Losses
) -> Source:
    spec = TensorSpec(name=f"{name}.weight", dtype="float32", shape=(k, n), group=group, form="fp32", parameters=n * k)

    def read() -> list[npt.NDArray[Any]]:
        weight = weights.linear(name)
        if isinstance(weight, BinaryLinear):
            raise CheckpointError(f"{name} is binary, but the config's scaling_pattern is 'none'")
        return [np.ascontiguousarray(shaped(name, weight, (n, k)).T)]

    return Source(specs=(spec,), read=read)


def _binary_linear(
    weights: Weights, name: str, n: int, k: int, group: str, options: ExportOptions, losses: Losses
) -> Source:
    pattern = weights.config.scaling_pattern

    def read() -> BinaryLinear:
        linear = weights.linear(name)
        if not isinstance(linear, BinaryLinear):
            raise CheckpointError(f"{name} is not binary with scaling_pattern {pattern!r}, as the config says")
        losses.zeros += linear.zeros
        return linear

    if not options.ours(weights.config) and not options.unfolded:
        return stock_source(name, n, k, pattern, read, group=group, bits=options.stock_bits)
    return binary_source(name, n, k, pattern, read, group=group, block_scales=options.block_scales)


def _rope_tables(config: ModelConfig) -> Source:
    shape = (config.max_position_embeddings, config.head_dim // 2)
    specs = tuple(
        TensorSpec(name=f"rope.{name}", dtype="float32", shape=shape, group="rope", form="fp32", parameters=0)
        for name in ("cos", "sin")
    )
    return Source(specs=specs, read=lambda: rope_angles(0, shape[0], config, np.float32))
