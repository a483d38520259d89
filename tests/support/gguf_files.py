"""GGUF files for tests: sound ones through the gguf package, broken ones byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np


@dataclass(frozen=True)
class Blocks:
    """A tensor as ggml's blocks: uint8 [..., bytes of a row] and the type they are of."""

    ggml_type: str
    data: np.ndarray


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray | Blocks] | None = None
) -> Path:
    """Write `metadata` (general.architecture among it; ints become uint32) and float32 or float16 arrays or Blocks."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, list(value))
    for name, tensor in (tensors or {}).items():
        if isinstance(tensor, Blocks):
            writer.add_tensor(name, tensor.data, raw_dtype=gguf.GGMLQuantizationType[tensor.ggml_type])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q1_0_blocks(signs: np.ndarray, scales: np.ndarray) -> Blocks:
    """Signs [N, K] (>= 0: +1) and scales [N, K/128] -> Q1_0 as its definition says: bit i of byte j is weight 8j + i."""
    n, groups = scales.shape
    blocks = np.empty((n, groups, 18), np.uint8)
    blocks[..., :2] = scales.astype("<f2")[..., None].view(np.uint8)
    bits = (signs >= 0).reshape(n, groups, 16, 8)
    blocks[..., 2:] = (bits * (1 << np.arange(8))).sum(axis=-1)
    return Blocks("Q1_0", blocks.reshape(n, -1))


def text(value: str | bytes) -> bytes:
    """A string as GGUF spells it."""
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A metadata pair; kinds: 4 uint32, 8 string, 9 array."""
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    """The value of a pair of kind 9."""
    return struct.pack("<IQ", kind, count) + values


def tensor_info(
    name: str | bytes, sizes: Sequence[int], ggml_type: int, offset: int, dimensions: int | None = None
) -> bytes:
    """A tensor's entry; `sizes` in the file's order, the row's length first."""
    shape = struct.pack(f"<{len(sizes)}Q", *sizes)
    count = len(sizes) if dimensions is None else dimensions
    return text(name) + struct.pack("<I", count) + shape + struct.pack("<IQ", ggml_type, offset)


@dataclass(frozen=True, kw_only=True)
class RawGguf:
    """A GGUF file of parts, each of which may be wrong."""

    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    pairs: Sequence[bytes] = (pair("general.architecture", 8, text("llama")),)
    tensors: Sequence[bytes] = ()
    pair_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    data: bytes = field(default=b"", repr=False)

    def write(self, path: Path) -> Path:
        """Write it to `path`."""
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        pair_count = len(self.pairs) if self.pair_count is None else self.pair_count
        head = self.magic + self.version + struct.pack("<QQ", tensor_count, pair_count)
        head += b"".join(self.pairs) + b"".join(self.tensors)
        path.write_bytes(head + bytes(-len(head) % self.alignment) + self.data)
        return path
