"""GroupQueryAttention over an int8 cache written down a second time: random problems, and attention in float64.

Nothing here calls the op library; the tests compare it with this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, ModelProto, TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
CONTEXT = 600
CACHE = ("past_key", "past_value", "past_key_scale", "past_value_scale")
INPUTS = ("qkv", *CACHE, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache", "q_norm", "k_norm")
OUTPUTS = ("attention", "present_key", "present_value", "present_key_scale", "present_value_scale")
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Shape:
    """H query heads, G KV heads of size D."""

    heads: int
    kv_heads: int
    d: int
    norms: bool = False

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.d


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the node holds itself."""

    cos: Array = field(repr=False)  # [CONTEXT, D/2]
    sin: Array = field(repr=False)
    q_norm: Array | None = None
    k_norm: Array | None = None


def weights(shape: Shape) -> Weights:
    frequencies = 10000.0 ** (-np.arange(0, shape.d, 2) / shape.d)
    angles = np.arange(CONTEXT)[:, None] * frequencies
    rng = np.random.default_rng(shape.d)
    norms = [rng.uniform(0.5, 1.5, shape.d).astype(np.float32) if shape.norms else None for _ in range(2)]
    return Weights(
        cos=np.cos(angles).astype(np.float32), sin=np.sin(angles).astype(np.float32), q_norm=norms[0], k_norm=norms[1]
    )


def projections(shape: Shape, batch: int, tokens: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Random qkv [batch, tokens, width]."""
    return np.random.default_rng([seed, batch, tokens]).normal(0, 1, (batch, tokens, shape.width)).astype(np.float32)


def empty_cache(shape: Shape, batch: int, rows: int) -> dict[str, Array]:
    """Zeros, as a session begins with; `rows` of 0 for a past of nothing."""
    size = (batch, shape.kv_heads, rows)
    return {
        "past_key": np.zeros((*size, shape.d), np.int8),
        "past_value": np.zeros((*size, shape.d), np.int8),
        "past_key_scale": np.zeros(size, np.float32),
        "past_value_scale": np.zeros(size, np.float32),
    }


def new_rows(shape: Shape, w: Weights, qkv: Array, first: Sequence[int]) -> tuple[Array, Array, Array]:
    """Queries [B, H, S, D], keys and values [B, G, S, D] in float64: normed, rotated, as they would enter the cache."""
    batch, tokens, _ = qkv.shape
    split = np.split(qkv.astype(np.float64), [shape.heads * shape.d, (shape.heads + shape.kv_heads) * shape.d], axis=-1)
    q, k, v = (part.reshape(batch, tokens, -1, shape.d).swapaxes(1, 2) for part in split)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = (x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * n for x, n in ((q, w.q_norm), (k, w.k_norm)))
    at = np.array([[first[b] + t for t in range(tokens)] for b in range(batch)])
    cos, sin = w.cos[at][:, None].astype(np.float64), w.sin[at][:, None].astype(np.float64)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def expected(shape: Shape, w: Weights, qkv: Array, present: dict[str, Array], first: Sequence[int]) -> Array:
    """softmax(q · kᵀ / √D) · v in float64 over the cache `present` (which holds the new rows): [B, S, H · D]."""
    queries, _, _ = new_rows(shape, w, qkv, first)
    keys = present["present_key"] * present["present_key_scale"][..., None].astype(np.float64)
    values = present["present_value"] * present["present_value_scale"][..., None].astype(np.float64)
    group = shape.heads // shape.kv_heads
    scores = queries @ np.repeat(keys, group, 1).swapaxes(-1, -2) / np.sqrt(shape.d)
    rows = np.arange(keys.shape[2])
    for b, start in enumerate(first):
        for t in range(qkv.shape[1]):
            scores[b, :, t, rows > start + t] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = shares / shares.sum(-1, keepdims=True) @ np.repeat(values, group, 1)
    return np.asarray(mixed.swapaxes(1, 2).reshape(*qkv.shape[:2], -1))


def attention_model(
    shape: Shape,
    *,
    functions: Sequence[FunctionProto] = (),
    attributes: dict[str, Any] | None = None,
    tensors: dict[str, Array | None] | None = None,
) -> ModelProto:
    """A model of one node named `attention`; `attributes` and `tensors` (the constants) replace the right ones."""
    w = weights(shape)
    constants = {"cos_cache": w.cos, "sin_cache": w.sin, "q_norm": w.q_norm, "k_norm": w.k_norm, **(tensors or {})}
    names = [name if constants.get(name, name) is not None else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    attrs = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "scale": shape.d**-0.5, "epsilon": EPSILON}
    attrs |= attributes or {}
    node = helper.make_node(
        "GroupQueryAttention", names, list(OUTPUTS), name="attention", domain="fbiedge",
        **{name: value for name, value in attrs.items() if value is not None},
    )  # fmt: skip
    types = [TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT8, TensorProto.FLOAT, TensorProto.FLOAT]
    cache = ["batch", "kv_heads", "rows"]
    shapes: list[list[str]] = [["batch", "tokens", "width"], [*cache, "d"], [*cache, "d"], cache, cache]
    inputs = [helper.make_tensor_value_info(n, t, s) for n, t, s in zip(INPUTS, types, shapes, strict=False)]
    inputs.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["rows_of_batch"]))
    inputs.append(helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, None))
    outputs = [
        helper.make_tensor_value_info(n, t, [f"{n}_{i}" for i in range(len(s))])
        for n, t, s in zip(OUTPUTS, types, shapes, strict=True)
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items() if array is not None]
    graph = helper.make_graph([node], "one_node", inputs, outputs, initializers)
    opsets = [
        helper.make_opsetid(domain, version) for domain, version in (("", 21), ("com.microsoft", 1), ("fbiedge", 1))
    ]
    return helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=10)
