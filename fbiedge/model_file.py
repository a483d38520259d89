"""What a model.onnx says about itself, read without ONNX Runtime and without the onnx package.

An ONNX file is one protobuf message, so its top level can be walked by skipping over fields: metadata takes microseconds
to find however large the weights are. The walk also tells apart what ONNX Runtime calls "Protobuf parsing failed" in
every case: a file that is no ONNX at all, one that was cut short, and one whose external data was.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import ModelConfig
from .errors import FbiEdgeError, ModelFileError
from .files import require_utf8

FORMAT_VERSION = "1"

# Field numbers of onnx.proto3. A wire type of 0 is a varint, 2 a length followed by that many bytes.
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_INITIALIZER, _TENSOR_NAME, _TENSOR_EXTERNAL_DATA = 5, 8, 13


class _Malformed(Exception):
    """The bytes are not a protobuf message."""


class _Truncated(Exception):
    """A field runs past the end; the argument is the smallest size in bytes that the file should have."""


class _Misplaced(Exception):
    """A tensor's external data is at no usable place; the argument says which and why."""


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model.onnx written by fbiedge, checked to be whole. `metadata` keys come without the prefix `fbiedge.`."""

    path: Path
    config: ModelConfig
    metadata: dict[str, str] = field(repr=False)
    file_bytes: int
    external_bytes: dict[str, int]  # size of each external data file by its name

    @classmethod
    def open(cls, path: Path) -> ModelFile:
        """Read the metadata of the model at `path`. Raises ModelFileError."""
        require_utf8(path, ModelFileError)
        path = _resolve(Path(path))
        properties, external, size = _walk(path)
        if not any(key.startswith("fbiedge.") for key in properties):
            raise ModelFileError(
                f"{path} is an ONNX file but not one of fbiedge's (no fbiedge.* metadata); "
                "make one with `fbiedge export CHECKPOINT --to onnx -o model.onnx`"
            )
        metadata = {
            key.removeprefix("fbiedge."): text for key, text in properties.items() if key.startswith("fbiedge.")
        }
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise ModelFileError(
                f"{path} has format version {version}, this fbiedge reads {FORMAT_VERSION}; update fbiedge or export again"
            )
        try:
            config = ModelConfig.from_dict(load_json(metadata["config"]))
        except (KeyError, ValueError, AttributeError, FbiEdgeError) as error:
            raise ModelFileError(f"{path} has an unusable fbiedge.config: {error}") from error
        return cls(
            path=path,
            config=config,
            metadata=metadata,
            file_bytes=size,
            external_bytes=_check_external(path, external),
        )

    @property
    def accuracy_level(self) -> str:
        """The accuracy level the file asks for: `int8` or `fp32`."""
        return self.metadata.get("accuracy_level", "int8")

    @property
    def kv_cache(self) -> str:
        """How the file holds keys and values: `int8` or `fp32`."""
        return self.metadata.get("kv_cache", "fp32")

    def json(self, key: str) -> Any:
        """The JSON under metadata `key`, or None where the file has none. Raises ModelFileError."""
        text = self.metadata.get(key)
        if text is None:
            return None
        try:
            return load_json(text)
        except ValueError as error:
            raise ModelFileError(
                f"{self.path} has unreadable JSON in fbiedge.{key} ({error}); export it again"
            ) from error

    def json_object(self, key: str) -> dict[str, Any]:
        """As `json`, for a JSON object; empty where the file has none."""
        value = self.json(key) or {}
        if not isinstance(value, dict):
            raise ModelFileError(f"{self.path} has a {type(value).__name__} in fbiedge.{key}, expected a JSON object")
        return value


def load_json(text: str) -> Any:
    """As json.loads. JSON that is nested too deeply to read is a ValueError too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def external_place(entries: Mapping[str, str]) -> tuple[str, int, int]:
    """File name, offset and length of a tensor's external data, from its entries in the file.

    Only a plain name beside the model is followed. Raises ValueError, whose text goes on from the tensor's name.
    """
    location = entries.get("location", "")
    if location in ("", ".", "..") or Path(location).name != location or "\\" in location or "\0" in location:
        raise ValueError(f"lies in {location!r}, expected a file beside the model")
    for key in ("offset", "length"):
        text = entries.get(key, "")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise ValueError(f"has {text!r} as the {key} of its data, expected a number of bytes")
    return location, int(entries["offset"]), int(entries["length"])


def _resolve(path: Path) -> Path:
    if path.is_dir():
        if (path / "model.onnx").is_file():
            return path / "model.onnx"
        if (path / "config.json").is_file():
            raise ModelFileError(
                f"{path} is a checkpoint; export it first: fbiedge export {path} --to onnx -o model.onnx"
            )
        if (path / "run.json").is_file():
            raise ModelFileError(f"{path} is a training run; its model is {path / 'model'}")
        raise ModelFileError(f"{path} is a folder without a model.onnx")
    if not path.exists():
        raise ModelFileError(f"{path} does not exist; expected a model.onnx made by `fbiedge export`")
    return path


def _walk(path: Path) -> tuple[dict[str, str], dict[str, int], int]:
    """-> metadata_props, the end in bytes that each external data file must reach, the size of the file in bytes."""
    properties: dict[str, str] = {}
    external: dict[str, int] = {}
    has_graph = False
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise ModelFileError(f"{path} is empty, expected an ONNX model")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for number, wire_type, start, end in _fields(data, 0, size):
                    if _MODEL_FIELDS.get(number) != wire_type:
                        raise _Malformed
                    if number == _MODEL_METADATA:
                        key, text = _string_pair(data, start, end)
                        properties[key] = text
                    elif number == _MODEL_GRAPH:
                        has_graph = True
                        _collect_external(data, start, end, external)
    except _Truncated as error:
        raise ModelFileError(
            f"{path} is cut short: {size} bytes, expected at least {error.args[0]}; copy or export it again"
        ) from error
    except (_Malformed, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} is not an ONNX file; expected a model.onnx made by `fbiedge export`") from error
    except _Misplaced as error:
        raise ModelFileError(f"{path}: {error}; export it again") from error
    except OSError as error:
        raise ModelFileError(f"can't read {path}: {error.strerror or error}") from error
    if not has_graph:
        raise ModelFileError(f"{path} is not an ONNX file (it holds no graph)")
    return properties, external, size


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """-> the value and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _Truncated(end + 1)
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Malformed


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Fields of the message in data[start:end]: number, wire type, and the bytes [start, end) of the value."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        value_start = position
        if wire_type == 0:
            _, position = _varint(data, position, end)
        elif wire_type == 2:
            length, value_start = _varint(data, position, end)
            position = value_start + length
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        else:
            raise _Malformed
        if number == 0 or (start == 0 and _MODEL_FIELDS.get(number) != wire_type):
            raise _Malformed  # checked before the length, which means nothing in a file that isn't ONNX
        if position > end:
            raise _Truncated(position)
        yield number, wire_type, value_start, position


def _string_pair(data: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    """A StringStringEntryProto."""
    pair = {number: data[first:last].decode() for number, _, first, last in _fields(data, start, end)}
    return pair.get(1, ""), pair.get(2, "")


def _collect_external(data: mmap.mmap, start: int, end: int, external: dict[str, int]) -> None:
    """Note for each external data file how far the initializers of this GraphProto reach into it, in bytes."""
    for number, _, tensor_start, tensor_end in _fields(data, start, end):
        if number != _GRAPH_INITIALIZER:
            continue
        name, entries = "", {}
        for field_number, _, first, last in _fields(data, tensor_start, tensor_end):
            if field_number == _TENSOR_NAME:
                name = data[first:last].decode()
            elif field_number == _TENSOR_EXTERNAL_DATA:
                key, text = _string_pair(data, first, last)
                entries[key] = text
        if entries:
            try:
                location, offset, length = external_place(entries)
            except ValueError as error:
                raise _Misplaced(f"{name} {error}") from error
            external[location] = max(offset + length, external.get(location, 0))


def _check_external(path: Path, external: dict[str, int]) -> dict[str, int]:
    """Sizes of the external data files. Reading past the end of a mapped file would kill the process, so check first."""
    sizes = {}
    for name, reach in external.items():
        data_path = path.parent / name
        if not data_path.is_file():
            raise ModelFileError(f"{data_path} does not exist; {path.name} keeps its weights there, copy it along")
        sizes[name] = data_path.stat().st_size
        if sizes[name] < reach:
            raise ModelFileError(
                f"{data_path} is cut short: {sizes[name]} bytes, expected at least {reach}; copy it again"
            )
    return sizes
