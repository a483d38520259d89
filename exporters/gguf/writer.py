"""Streams a GGUF file by the gguf package's writer, one tensor in memory, and stamps it with the hash of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf  # noqa: TID253
import numpy as np

from .metadata import HASH_KEY, HASH_PLACEHOLDER
from .plan import PlannedTensor

Progress = Callable[[str, int, int], None]
"""Called after each tensor: its name, bytes written so far, bytes in all."""


class ModelWriter(gguf.GGUFWriter):
    """The package's writer, which also takes an empty array: a tokenizer may have no merges, but llama.cpp asks for them."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
            head = self._pack("I", vtype) if add_vtype else b""
            return bytes(head + self._pack("I", sub_type) + self._pack("Q", 0))
        return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))


def write_model(
    path: Path,
    architecture: str,
    add_metadata: Callable[[ModelWriter], None],
    tensors: Sequence[PlannedTensor],
    progress: Progress | None = None,
) -> str:
    """Write the file -> the SHA-256 of its tensor data, which it also holds."""
    writer = ModelWriter(path, architecture)
    add_metadata(writer)
    for tensor in tensors:
        spec = tensor.spec
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(spec.dtype), spec.nbytes, tensor.kind)
    total, done, digest = sum(tensor.spec.nbytes for tensor in tensors), 0, hashlib.sha256()
    try:
        # 1. Header, pairs and the places of all tensors.
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # 2. Tensors, in order.
        for tensor in tensors:
            spec, array = tensor.spec, np.ascontiguousarray(tensor.read())
            if array.shape != spec.shape or array.dtype.name != spec.dtype:
                raise ValueError(f"{spec.name} is {array.dtype} {array.shape}, planned as {spec.dtype} {spec.shape}")
            digest.update(array.data)
            writer.write_tensor_data(array)
            done += spec.nbytes
            if progress is not None:
                progress(spec.name, done, total)
    finally:
        writer.close()
    # 3. The hash, over its placeholder.
    _stamp(path, digest.hexdigest())
    return digest.hexdigest()


def _stamp(path: Path, sha256: str) -> None:
    pair = HASH_KEY.encode() + gguf.GGUFValueType.STRING.to_bytes(4, "little") + (64).to_bytes(8, "little")
    with path.open("r+b") as file:
        head = b""
        while pair + HASH_PLACEHOLDER.encode() not in head:
            part = file.read(1 << 20)
            assert part, "the pairs end with the placeholder"
            head += part
        file.seek(head.index(pair) + len(pair))
        file.write(sha256.encode())
