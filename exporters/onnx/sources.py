"""Tensors of a model file before any is read: name, dtype, shape and group of each, and how one read brings some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.bits import TILE_BYTES, TILE_INPUTS, TILE_ROWS, tile_bits
from fbiedge.config import BLOCK_SIZE, ScalingPattern
from fbiedge.errors import CheckpointError
from fbiedge.weights import BinaryLinear, Weights

from .options import Storage

DTYPES: dict[Storage, str] = {"fp32": "float32", "fp16": "float16"}


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


def plain_source(
    weights: Weights, name: str, shape: tuple[int, ...], group: str, dtype: str = "float32", form: str = "fp32"
) -> Source:
    """A full-precision tensor as it is."""
    spec = TensorSpec(name=name, dtype=dtype, shape=shape, group=group, form=form, parameters=prod(shape))
    return Source(specs=(spec,), read=lambda: [as_dtype(name, shaped(name, weights.tensor(name), shape), dtype)])


def binary_source(
    name: str,
    n: int,
    k: int,
    pattern: ScalingPattern,
    read_linear: Callable[[], BinaryLinear],
    *,
    group: str,
    block_scales: Storage,
) -> Source:
    """`{name}.bits`, .alpha and, but for `block`, .beta of a binary matrix. Its read checks what `read_linear` brings."""
    row_tiles = -(-n // TILE_ROWS)
    if pattern == "block":
        scale_shape: tuple[int, ...] = (row_tiles, -(-k // BLOCK_SIZE), TILE_ROWS)
        scale_dtype, scale_names = DTYPES[block_scales], ["alpha"]
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
        linear = checked(name, read_linear(), n, k, pattern)
        tiles = tile_bits(linear.packed)
        if linear.beta is None:
            return [tiles, as_dtype(f"{name}.alpha", tile_scales(linear.alpha), scale_dtype)]
        return [tiles, linear.alpha, linear.beta]

    return Source(specs=(bits, *scales), read=read)


def checked(name: str, linear: BinaryLinear, n: int, k: int, pattern: ScalingPattern) -> BinaryLinear:
    """`linear`, which must be [n, k] in this pattern, with a beta but for `block`. Raises CheckpointError."""
    if linear.pattern != pattern:
        raise CheckpointError(f"{name} is not binary with scaling_pattern {pattern!r}, as the config says")
    if (linear.n, linear.k) != (n, k):
        raise CheckpointError(f"{name} has shape {(linear.n, linear.k)}, expected {(n, k)} by the config")
    if linear.beta is None and pattern != "block":
        raise CheckpointError(f"{name} has no wbias, expected one with scaling_pattern {pattern!r}")
    return linear


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


def shaped(name: str, array: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """`array`, which must have this shape. Raises CheckpointError."""
    if array.shape != shape:
        raise CheckpointError(f"{name} has shape {array.shape}, expected {shape} by the config")
    return array


def as_dtype(name: str, array: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """`array`, whose values must be in the range of this dtype. Raises CheckpointError."""
    if dtype == "float16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise CheckpointError(f"{name} holds values beyond fp16's 65504; export it as fp32")
    return array.astype(dtype, copy=False)
