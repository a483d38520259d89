"""What a model file stores: each tensor's name, dtype, shape and group are known before any weight is read.

Names are the checkpoint's, with the part after the last dot saying what is stored:

    model.embed_tokens.weight                     float32 or float16 [vocab, hidden]
    model.layers.0.self_attn.q_proj.bits          uint8 [ceil(N/16), ceil(K/32), 64], tiles (fbiedge.bits)
    model.layers.0.self_attn.q_proj.alpha, .beta  float32 (K,) column | (N,) row | (1,) single;
                                                  block: alpha float16 or float32 [ceil(N/16), ceil(K/128), 16]
    model.layers.0.self_attn.q_proj.weight        float32 [K, N], of an ordinary Llama (transposed for MatMul)
    model.layers.0.input_layernorm.weight         float32 [hidden]; of self_attn.q_norm and k_norm [head_dim]
    lm_head.tiles                                 int8 or int4 head: uint8 [ceil(N/16), ceil(K/128), …], see head.py
    lm_head.codes, lm_head.scales                 the same for stock operators
    lm_head.weight                                float32 [hidden, vocab], fp32 head (transposed for MatMul)
    rope.cos, rope.sin                            float32 [context, head_dim / 2]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.bits import TILE_BYTES, TILE_INPUTS, TILE_ROWS, tile_bits
from fbiedge.config import BLOCK_SIZE, ModelConfig
from fbiedge.errors import CheckpointError
from fbiedge.reference import rope_angles
from fbiedge.weights import BinaryLinear, Weights

from .head import BLOCK as HEAD_BLOCK
from .head import GROUP as HEAD_GROUP
from .head import HasQuantizedHead, QuantizedHead, quantize_head, tile_group_bytes
from .options import HEAD_BITS, ExportOptions, Storage

_DTYPES: dict[Storage, str] = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One stored tensor. `parameters` counts the model's weights in it (0 for scales and tables)."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int, ...]
    group: str  # embedding | attention | mlp | norms | head | rope
    form: str  # for people: "fp32", "1-bit column", …
    parameters: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Source:
    """Tensors that one read of the weights yields, in the order of `specs`."""

    specs: tuple[TensorSpec, ...]
    read: Callable[[], Sequence[npt.NDArray[Any]]]


@dataclass
class Losses:
    """What the stored form can't hold exactly; complete once every source was read."""

    zeros: int = 0  # latent weights that were exactly 0, stored as +1


def plan_tensors(weights: Weights, options: ExportOptions, losses: Losses) -> Iterator[Source]:
    """All tensors in the order of use, so that a mapped file is read front to back.

    Reading a source raises CheckpointError where a weight doesn't have the config's shape or doesn't fit its dtype.
    """
    config = weights.config
    hidden, vocab = config.hidden_size, config.vocab_size
    yield _plain(
        weights,
        "model.embed_tokens.weight",
        (vocab, hidden),
        "embedding",
        _DTYPES[options.embedding],
        options.embedding,
    )
    yield _rope_tables(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield _plain(weights, f"{prefix}input_layernorm.weight", (hidden,), "norms")
        for name, (n, k) in config.linear_shapes().items():
            if name == "self_attn.o_proj" and config.has_head_norms:
                for part in "qk":
                    yield _plain(weights, f"{prefix}self_attn.{part}_norm.weight", (config.head_dim,), "norms")
            if name == "mlp.gate_proj":
                yield _plain(weights, f"{prefix}post_attention_layernorm.weight", (hidden,), "norms")
            group = "attention" if name.startswith("self_attn") else "mlp"
            plan_linear = _dense_linear if config.scaling_pattern == "none" else _binary_linear
            yield plan_linear(weights, f"{prefix}{name}", n, k, group, options, losses)
    yield _plain(weights, "model.norm.weight", (hidden,), "norms")
    yield _head(weights, options)


def inventory(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Sizes by group: group, tensors, parameters, bytes, bits_per_weight (0 for a group without weights), form."""
    rows = []
    for group in dict.fromkeys(spec.group for spec in specs):
        members = [spec for spec in specs if spec.group == group]
        parameters, size = sum(spec.parameters for spec in members), sum(spec.nbytes for spec in members)
        rows.append(
            {
                "group": group,
                "tensors": len(members),
                "parameters": parameters,
                "bytes": size,
                "bits_per_weight": round(8 * size / parameters, 3) if parameters else 0.0,
                "form": members[0].form,
            }
        )
    return rows


def _plain(
    weights: Weights, name: str, shape: tuple[int, ...], group: str, dtype: str = "float32", form: str = "fp32"
) -> Source:
    spec = TensorSpec(name=name, dtype=dtype, shape=shape, group=group, form=form, parameters=prod(shape))
    return Source(specs=(spec,), read=lambda: [_as_dtype(name, _shaped(name, weights.tensor(name), shape), dtype)])


def _dense_linear(
    weights: Weights, name: str, n: int, k: int, group: str, options: ExportOptions, losses: Losses
) -> Source:
    spec = TensorSpec(name=f"{name}.weight", dtype="float32", shape=(k, n), group=group, form="fp32", parameters=n * k)

    def read() -> list[npt.NDArray[Any]]:
        weight = weights.linear(name)
        if isinstance(weight, BinaryLinear):
            raise CheckpointError(f"{name} is binary, but the config's scaling_pattern is 'none'")
        return [np.ascontiguousarray(_shaped(name, weight, (n, k)).T)]

    return Source(specs=(spec,), read=read)


def _binary_linear(
    weights: Weights, name: str, n: int, k: int, group: str, options: ExportOptions, losses: Losses
) -> Source:
    pattern = weights.config.scaling_pattern
    row_tiles = -(-n // TILE_ROWS)
    if pattern == "block":
        scale_shape: tuple[int, ...] = (row_tiles, -(-k // BLOCK_SIZE), TILE_ROWS)
        scale_dtype, scale_names = _DTYPES[options.block_scales], ["alpha"]
    else:
        scale_shape = {"column": (k,), "row": (n,), "single": (1,)}[pattern]
        scale_dtype, scale_names = "float32", ["alpha", "beta"]
    form = f"1-bit {pattern}"
    bits = TensorSpec(
        name=f"{name}.bits",
        dtype="uint8",
        shape=(row_tiles, -(-k // TILE_INPUTS), TILE_BYTES),
        group=group,
        form=form,
        parameters=n * k,
    )
    scales = [
        TensorSpec(name=f"{name}.{which}", dtype=scale_dtype, shape=scale_shape, group=group, form=form, parameters=0)
        for which in scale_names
    ]

    def read() -> list[npt.NDArray[Any]]:
        linear = weights.linear(name)
        if not isinstance(linear, BinaryLinear) or linear.pattern != pattern:
            raise CheckpointError(f"{name} is not binary with scaling_pattern {pattern!r}, as the config says")
        if (linear.n, linear.k) != (n, k):
            raise CheckpointError(f"{name} has shape {(linear.n, linear.k)}, expected {(n, k)} by the config")
        losses.zeros += linear.zeros
        tiles = tile_bits(linear.packed)
        if pattern == "block":
            return [tiles, _as_dtype(f"{name}.alpha", tile_scales(linear.alpha), scale_dtype)]
        if linear.beta is None:
            raise CheckpointError(f"{name} has no wbias, expected one with scaling_pattern {pattern!r}")
        return [tiles, linear.alpha, linear.beta]

    return Source(specs=(bits, *scales), read=read)


def tile_scales(alpha: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Block scales [N, G] -> [ceil(N/16), G, 16]: the 16 scales that one row of tiles needs lie side by side."""
    n, groups = alpha.shape
    row_tiles = -(-n // TILE_ROWS)
    padded = np.zeros((row_tiles * TILE_ROWS, groups), alpha.dtype)
    padded[:n] = alpha
    return np.ascontiguousarray(padded.reshape(row_tiles, TILE_ROWS, groups).transpose(0, 2, 1))


def untile_scales(tiled: npt.NDArray[Any], n: int) -> npt.NDArray[np.float32]:
    """Block scales [ceil(N/16), G, 16] -> float32 [N, G]."""
    row_tiles, groups, _ = tiled.shape
    rows = tiled.transpose(0, 2, 1).reshape(row_tiles * TILE_ROWS, groups)
    return np.ascontiguousarray(rows[:n], np.float32)


def _head(weights: Weights, options: ExportOptions) -> Source:
    vocab, hidden = weights.config.vocab_size, weights.config.hidden_size
    blocks, parameters = -(-hidden // HEAD_BLOCK), vocab * hidden

    def head() -> npt.NDArray[np.float32]:
        return _shaped("lm_head.weight", weights.tensor("lm_head.weight"), (vocab, hidden))

    if options.head == "fp32":
        spec = TensorSpec(
            name="lm_head.weight",
            dtype="float32",
            shape=(hidden, vocab),
            group="head",
            form="fp32",
            parameters=parameters,
        )
        return Source(specs=(spec,), read=lambda: [np.ascontiguousarray(head().T)])
    bits, form = HEAD_BITS[options.head], f"{options.head} block {HEAD_BLOCK}"

    def quantized() -> QuantizedHead:
        stored = weights.quantized_head(bits) if isinstance(weights, HasQuantizedHead) else None
        return stored or quantize_head(head(), bits)

    def part_spec(part: str, dtype: str, shape: tuple[int, ...], parameters: int) -> TensorSpec:
        name = f"lm_head.{part}"
        return TensorSpec(name=name, dtype=dtype, shape=shape, group="head", form=form, parameters=parameters)

    if options.ours(weights.config):
        shape = (-(-vocab // TILE_ROWS), -(-hidden // HEAD_GROUP), tile_group_bytes(bits))
        return Source(specs=(part_spec("tiles", "uint8", shape, parameters),), read=lambda: [quantized().tiles()])
    codes = part_spec("codes", "uint8", (vocab, blocks, HEAD_BLOCK * bits // 8), parameters)
    scales = part_spec("scales", "float32", (vocab * blocks,), 0)
    return Source(specs=(codes, scales), read=lambda: quantized().stock())


def _rope_tables(config: ModelConfig) -> Source:
    shape = (config.max_position_embeddings, config.head_dim // 2)
    specs = tuple(
        TensorSpec(name=f"rope.{name}", dtype="float32", shape=shape, group="rope", form="fp32", parameters=0)
        for name in ("cos", "sin")
    )
    return Source(specs=specs, read=lambda: rope_angles(0, shape[0], config, np.float32))


def _shaped(name: str, array: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if array.shape != shape:
        raise CheckpointError(f"{name} has shape {array.shape}, expected {shape} by the config")
    return array


def _as_dtype(name: str, array: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    if dtype == "float16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise CheckpointError(f"{name} holds values beyond fp16's 65504; export it as fp32")
    return array.astype(dtype, copy=False)
