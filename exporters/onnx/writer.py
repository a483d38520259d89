"""Streams a model file: tensors go to disk one source at a time, and the files appear whole or not at all.

Small models are one file. Above 64 MB (`EMBED_LIMIT_BYTES`) the weights go to `<name>.onnx.data` beside it, which ONNX
Runtime maps instead of reading; only tensors below 1 KiB stay in the model file.

Alignment in the data file: 4096 bytes, a page, is what mapping asks for on Linux and macOS; Windows maps at multiples
of 65536. So tensors of 1 MiB and more start at multiples of 65536, where the gap is at most 6 % of the tensor and on
average far less, and smaller ones at 4096: on Windows those few are read, not mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto  # noqa: TID253

from fbiedge.files import atomic_files, real_target, require_room

from .sources import Source, TensorSpec

EMBED_LIMIT_BYTES = 64 * 1000 * 1000
_INLINE_BELOW_BYTES = 1024
_PAGE, _LARGE_PAGE, _LARGE_TENSOR_BYTES = 4096, 65536, 1 << 20
_DATA_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}

Progress = Callable[[str, int, int], None]
"""Called after each tensor: its name, bytes written so far, bytes in all."""


@dataclass(frozen=True, kw_only=True)
class WrittenFiles:
    model: Path
    data: Path | None
    model_bytes: int
    data_bytes: int


def data_path(model: Path) -> Path:
    """Where the external data of `model` lies."""
    return model.with_name(model.name + ".data")


def write_model(
    model: ModelProto,
    sources: Sequence[Source],
    target: Path,
    *,
    embed_limit_bytes: int = EMBED_LIMIT_BYTES,
    progress: Progress | None = None,
    check: Callable[[Path], object] | None = None,
) -> WrittenFiles:
    """Write `model` with the tensors of `sources` as initializers; an older file of that name is replaced.

    `check(path)` tries the finished file where it lies for now; what it raises keeps the file from appearing.
    Raises OutputError where the disk refuses, and whatever reading a source or `check` raises; then nothing is left
    behind, and an older file is as it was.
    """
    specs = [spec for source in sources for spec in source.specs]
    total = sum(spec.nbytes for spec in specs)
    external = total > embed_limit_bytes
    require_room(target, total, "model.onnx")
    target = real_target(target, "a file") if target.is_symlink() else target  # the data lies beside the file itself
    data_target, replaces = data_path(target), target.exists()
    if external:
        real_target(data_target, "a file")
    # 1. Temporary names, in a folder of their own: there the model finds its data under the final name.
    with atomic_files(target) as model_file:
        # 2. Tensors, in order; each leaves an initializer with its data or with its place in the data file.
        data_bytes = done = 0
        with open(data_path(model_file), "wb") if external else nullcontext() as data:
            for source in sources:
                for spec, array in zip(source.specs, source.read(), strict=True):
                    model.graph.initializer.append(_initializer(spec, array, data, data_target.name))
                    done += spec.nbytes
                    if progress is not None:
                        progress(spec.name, done, total)
            data_bytes = data.tell() if data is not None else 0
        # 3. The model itself.
        with open(model_file, "wb") as file:
            model_bytes = file.write(model.SerializeToString())
        if check is not None:
            check(model_file)
    if replaces and not external:
        with suppress(OSError):
            data_target.unlink()  # what an earlier, larger model of this name left
    return WrittenFiles(
        model=target, data=data_target if external else None, model_bytes=model_bytes, data_bytes=data_bytes
    )


def _initializer(spec: TensorSpec, array: npt.NDArray[Any], data: BinaryIO | None, location: str) -> TensorProto:
    if array.shape != spec.shape or array.dtype.name != spec.dtype:
        raise ValueError(f"{spec.name} is {array.dtype} {array.shape}, planned as {spec.dtype} {spec.shape}")
    tensor = TensorProto(name=spec.name, dims=spec.shape, data_type=_DATA_TYPES[spec.dtype])
    if data is None or spec.nbytes < _INLINE_BELOW_BYTES:
        tensor.raw_data = array.tobytes()
        return tensor
    alignment = _LARGE_PAGE if spec.nbytes >= _LARGE_TENSOR_BYTES else _PAGE
    offset = -(-data.tell() // alignment) * alignment
    data.write(bytes(offset - data.tell()))
    data.write(np.ascontiguousarray(array).data)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", spec.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
