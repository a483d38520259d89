"""A GGUF file: metadata and the places of its tensors, read from the header; tensor data is mapped on demand.

The container, versions 2 and 3, little-endian (a "string" is a uint64 length and that many bytes of UTF-8):

    "GGUF"  uint32 version  uint64 tensors  uint64 pairs
    pairs   : string key, uint32 type, value            an array is uint32 type, uint64 count, values
    tensors : string name, uint32 dimensions, uint64 size of each (fastest first), uint32 ggml type, uint64 offset
    zeros up to a multiple of general.alignment (32 unless stated), then the data that the offsets count from

Files come from strangers, so no number is believed: whatever it counts must fit into the rest of the file before
anything is allocated, and no tensor may lie outside of the file or in another one.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import ModelFileError
from .files import require_utf8

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32

# Value types by their number: a struct format for scalars; 8 is a string, 9 an array.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SMALLEST_PAIR = 8 + 4 + 1  # bytes: an empty key, its type, a byte
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension

# ggml's tensor types by their number: name, weights a block, bytes a block.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where a tensor lies. `shape` is numpy's: the rows of a linear first, its inputs last."""

    name: str
    ggml_type: str  # as in GGML_TYPES
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A GGUF file whose header is sound and whose tensors are all there; make one with `open`.

    Values in `metadata` are int, float, bool, str, list[str], or a numpy array for an array of numbers.
    """

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GgufTensor] = field(repr=False)
    file_bytes: int

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read and check the header of the file at `path`. Raises ModelFileError."""
        path = Path(path)
        require_utf8(path, ModelFileError)
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size == 0:
                    raise ModelFileError(f"{path} is empty, expected a GGUF model; get it again")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    metadata, tensors = _Reader(path, data, size).header()
        except FileNotFoundError:
            raise ModelFileError(f"{path} does not exist; expected a GGUF model") from None
        except OSError as error:
            raise ModelFileError(f"can't read {path}: {error.strerror or error}") from error
        return cls(path=path, metadata=metadata, tensors=tensors, file_bytes=size)

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, mapped by a mapping of their own: read pages go with the array."""
        tensor = self.tensors[name]
        try:
            return np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        except (OSError, ValueError) as error:  # ValueError: it was made shorter since
            raise ModelFileError(f"can't read {name} in {self.path}: {error}") from error


def metadata_value(
    metadata: Mapping[str, Any], key: str, kind: type[_Value], default: _Value | None = None
) -> _Value | None:
    """The value of `key`, or `default`. Raises ModelFileError where it is not of `kind`; an int may be a float."""
    value: Any = metadata.get(key, default)
    if kind is float and type(value) is int:
        value = float(value)
    if value is None or type(value) is kind:
        return value
    names = {
        np.ndarray: "numbers",
        list: "a list of texts",
        str: "text",
        int: "an integer",
        float: "a number",
        bool: "a bool",
    }
    raise ModelFileError(
        f"{key} is {names[type(value)]}, expected {names[kind]}; get the file again or convert it again"
    )


class _Reader:
    """Walks through the header of one file, front to back."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.position = 0

    def header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self.data[:4] != MAGIC:
            raise ModelFileError(
                f"{self.path} begins with {self.data[:4]!r}, expected {MAGIC!r}; it is not a GGUF file"
            )
        self.position = 4
        self.check_version()
        tensor_count, pair_count = self.number("<Q", "the number of tensors"), self.number("<Q", "the number of pairs")
        self.require(pair_count, _SMALLEST_PAIR, "metadata pairs")
        self.require(tensor_count, _SMALLEST_TENSOR, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.name("a metadata key")
            if key in metadata:
                raise self.broken(f"the metadata key {key} is there twice")
            metadata[key] = self.value(key)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.broken(f"general.alignment is {alignment!r}, expected a power of two")
        infos = [self.tensor_info(alignment) for _ in range(tensor_count)]
        start = -(-self.position // alignment) * alignment
        return metadata, self.placed(infos, start)

    def check_version(self) -> None:
        version = self.number("<I", "the version")
        if version in _VERSIONS:
            return
        if version & 0xFFFF == 0:  # 3 in the other byte order is 0x03000000
            raise ModelFileError(
                f"{self.path} is a big-endian GGUF file; expected a little-endian one, convert it with "
                "gguf-convert-endian"
            )
        expected = " or ".join(map(str, _VERSIONS))
        raise ModelFileError(f"{self.path} has GGUF version {version}, expected {expected}; convert the model again")

    def value(self, key: str) -> Any:
        kind = self.number("<I", f"the type of {key}")
        if kind in _SCALARS:
            value = self.number(_SCALARS[kind], key)
            # A float32 as the shortest decimal that means it: who wrote 1e-5 gets 1e-5 back.
            return float(str(np.float32(value))) if kind == _FLOAT32 else value
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            raise self.broken(f"{key} has the value type {kind}, expected 0 to 12")
        kind, count = self.number("<I", f"the type of {key}"), self.number("<Q", f"the length of {key}")
        if kind == _STRING:
            return self.strings(key, count)
        if kind not in _SCALARS:
            what = "is an array of arrays" if kind == _ARRAY else f"is an array of the value type {kind}"
            raise self.broken(f"{key} {what}, expected numbers or strings")
        dtype = np.dtype(_SCALARS[kind])
        self.require(count, dtype.itemsize, f"values in {key}")
        start, self.position = self.position, self.position + count * dtype.itemsize
        return np.frombuffer(self.data[start : self.position], dtype)

    def strings(self, key: str, count: int) -> list[str]:
        """Written without the methods below: vocabularies hold hundreds of thousands."""
        self.require(count, 8, f"strings in {key}")
        data, position, size = self.data, self.position, self.size
        read_length = struct.Struct("<Q").unpack_from
        texts = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + read_length(data, position)[0]
                if position > size:
                    raise self.cut_short(key, position)
                texts.append(data[start:position].decode())
        except struct.error:
            raise self.cut_short(key, position + 8) from None
        except UnicodeDecodeError:
            raise self.broken(f"{key} holds text that is not UTF-8") from None
        self.position = position
        return texts

    def tensor_info(self, alignment: int) -> GgufTensor:
        """The next tensor, its offset still as in the file."""
        name = self.name("a tensor's name")
        dimensions = self.number("<I", f"the dimensions of {name}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.broken(f"{name} has {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}")
        sizes = [self.number("<Q", f"the shape of {name}") for _ in range(dimensions)]
        kind, offset = self.number("<I", f"the type of {name}"), self.number("<Q", f"the offset of {name}")
        if kind not in GGML_TYPES:
            raise self.broken(f"{name} has ggml type {kind}, which this fbiedge doesn't know")
        ggml_type, block_weights, block_bytes = GGML_TYPES[kind]
        if 0 in sizes or sizes[0] % block_weights:
            raise self.broken(
                f"{name} of type {ggml_type} has rows of {sizes[0]} and shape {tuple(reversed(sizes))}, "
                f"expected rows of a multiple of {block_weights} and no empty dimension"
            )
        if offset % alignment:
            raise self.broken(f"{name} has the offset {offset}, expected a multiple of {alignment}")
        nbytes = prod(sizes) // block_weights * block_bytes
        return GgufTensor(name=name, ggml_type=ggml_type, shape=tuple(reversed(sizes)), offset=offset, nbytes=nbytes)

    def placed(self, infos: list[GgufTensor], start: int) -> dict[str, GgufTensor]:
        """By name, with offsets from the start of the file, which must hold all of them side by side."""
        tensors: dict[str, GgufTensor] = {}
        for info in infos:
            if info.name in tensors:
                raise self.broken(f"the tensor {info.name} is there twice")
            offset = start + info.offset
            if offset + info.nbytes > self.size:
                raise self.cut_short(info.name, offset + info.nbytes)
            tensors[info.name] = GgufTensor(
                name=info.name, ggml_type=info.ggml_type, shape=info.shape, offset=offset, nbytes=info.nbytes
            )
        for first, second in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
            if first.offset + first.nbytes > second.offset:
                raise self.broken(f"{second.name} lies where {first.name} does")
        return tensors

    def number(self, format: str, what: str) -> Any:
        start, self.position = self.position, self.position + struct.calcsize(format)
        if self.position > self.size:
            raise self.cut_short(what, self.position)
        return struct.unpack_from(format, self.data, start)[0]

    def string(self, what: str) -> str:
        length = self.number("<Q", what)
        start, self.position = self.position, self.position + length
        if self.position > self.size:
            raise self.cut_short(what, self.position)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not UTF-8") from None

    def name(self, what: str) -> str:
        """A string that error messages will show: nothing in it may end their line or talk to a terminal."""
        text = self.string(what)
        if not text or not text.isprintable():
            raise self.broken(f"{what} is {text[:40]!r}, expected a name")
        return text

    def require(self, count: int, smallest: int, what: str) -> None:
        """`count` things of at least `smallest` bytes must fit into the rest of the file."""
        left = self.size - self.position
        if count * smallest > left:
            raise ModelFileError(
                f"{self.path} claims {count:,} {what} in the {left:,} bytes left; it is cut short or damaged, get it again"
            )

    def cut_short(self, what: str, end: int) -> ModelFileError:
        return ModelFileError(
            f"{self.path} has {self.size:,} bytes, but {what} ends at {end:,}; it is cut short or damaged, get it again"
        )

    def broken(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is no usable GGUF file: {what}; get it again or convert it again")
