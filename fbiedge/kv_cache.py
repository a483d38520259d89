"""The memory of a model's KV cache: one place for keys, values and, with int8 rows, a scale for each row.

All buffers [1, kv_heads, rows, …] lie in one mapping. Its pages are zeros that take memory when they are first
written, so a large context costs what is used of it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .config import ModelConfig
from .errors import UsageError

Precision = Literal["int8", "fp16", "fp32"]  # fp16 is llama.cpp's
_PARTS: dict[Precision, dict[str, type[np.generic]]] = {
    "fp32": {"key": np.float32, "value": np.float32},
    "int8": {"key": np.int8, "value": np.int8, "key_scale": np.float32, "value_scale": np.float32},
}
_PAGE_BYTES = 4096
_SPARE_ROWS = 8  # a power of two of rows would put the same row of all heads into the same few lines of a cache


def precision_of(names: Iterable[str]) -> Precision:
    """What a model's inputs of these names hold."""
    return "int8" if "past_key_values.0.key_scale" in names else "fp32"


def cache_bytes(config: ModelConfig, precision: Precision, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens."""
    row = {"int8": config.head_dim + 4, "fp16": 2 * config.head_dim, "fp32": 4 * config.head_dim}[precision]
    return 2 * config.num_hidden_layers * config.num_key_value_heads * row * tokens


class KVCache:
    """Buffers by the names that a model's inputs and outputs have, without `past_key_values.` or `present.`."""

    def __init__(self, config: ModelConfig, precision: Precision, capacity: int) -> None:
        """Raises UsageError for a capacity that memory can't hold."""
        self.precision = precision
        shapes = {
            f"{layer}.{part}": (self._shape(config, part, capacity), np.dtype(dtype))
            for layer in range(config.num_hidden_layers)
            for part, dtype in _PARTS[precision].items()
        }
        sizes = [-(-math.prod(shape) * dtype.itemsize // _PAGE_BYTES) * _PAGE_BYTES for shape, dtype in shapes.values()]
        try:
            pages = _zeros(sum(sizes))
        except (MemoryError, OSError, OverflowError, ValueError) as error:
            raise UsageError(
                f"a context of {capacity} tokens takes {sum(sizes) / 1e9:.1f} GB, more than there is memory; "
                "choose a smaller one with --context"
            ) from error
        self.buffers: dict[str, npt.NDArray[Any]] = {}
        at = 0
        for (name, (shape, dtype)), size in zip(shapes.items(), sizes, strict=True):
            self.buffers[name] = np.frombuffer(pages, dtype, math.prod(shape), at).reshape(shape)
            at += size

    def bind(self, binding: Any) -> None:
        """Each buffer as past and as present, so that nothing is copied."""
        for name, buffer in self.buffers.items():
            place = ("cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def rows(self, count: int) -> Iterator[npt.NDArray[Any]]:
        """The first `count` rows of each buffer in turn."""
        return (np.ascontiguousarray(buffer[:, :, :count]) for buffer in self.buffers.values())

    def restore(self, count: int, rows: memoryview) -> None:
        """Write what `rows` gave, one buffer after another. Raises UsageError where it is not that long."""
        parts = [buffer[:, :, :count] for buffer in self.buffers.values()]
        expected = sum(part.nbytes for part in parts)
        if len(rows) != expected:
            raise UsageError(f"it has {len(rows)} bytes of keys and values, expected {expected}")
        for part in parts:
            part[...] = np.frombuffer(rows[: part.nbytes], part.dtype).reshape(part.shape)
            rows = rows[part.nbytes :]

    @staticmethod
    def _shape(config: ModelConfig, part: str, capacity: int) -> tuple[int, ...]:
        rows = (1, config.num_key_value_heads, capacity + _SPARE_ROWS)
        return rows if part.endswith("_scale") else (*rows, config.head_dim)


def _zeros(size: int) -> mmap.mmap:
    """Zeros in small pages.

    Not np.zeros: NumPy asks Linux for huge pages, and as every head's rows lie in one, the first token would touch
    nearly the whole cache (1.3B in float: 0.8 GB and 1.7 s).
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
