"""GgufFile: reads what the gguf package writes, and says of each broken header what is wrong with it."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from support.errors import raises_line
from support.gguf_files import RawGguf, array, pair, tensor_info, text, write_gguf

from fbiedge.errors import ModelFileError
from fbiedge.gguf_file import GGML_TYPES, GgufFile, metadata_value

ARCHITECTURE = pair("general.architecture", 8, text("llama"))


def refused(path: Path, *parts: str) -> None:
    with raises_line(ModelFileError, str(path), *parts):
        GgufFile.open(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_reads_what_the_gguf_package_writes(path: Path) -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.rope.freq_base": 500000.0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.tokens": ["<unk>", "▁a", ""],
        "tokenizer.ggml.scores": [0.0, -1.5, -2.0],
        "general.license": "Apache-2.0\n…",
    }
    tensors = {
        "a": np.arange(15, dtype=np.float32).reshape(3, 5),
        "b": np.arange(4, dtype=np.float16),
        "c": np.ones((2, 3, 4, 5), np.float32),
    }
    write_gguf(path, metadata, tensors)
    found = GgufFile.open(path)
    scores = found.metadata.pop("tokenizer.ggml.scores")
    np.testing.assert_array_equal(scores, np.float32(metadata.pop("tokenizer.ggml.scores")))
    assert found.metadata == metadata
    assert found.file_bytes == path.stat().st_size
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {n: t.shape for n, t in tensors.items()}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found.data(name).view(tensor.dtype).reshape(tensor.shape), tensor)


def test_every_number_type(path: Path) -> None:
    values = {kind: struct.pack(code, number) for kind, code, number in [
        (0, "<B", 200), (1, "<b", -3), (2, "<H", 60000), (3, "<h", -300), (4, "<I", 1 << 31), (5, "<i", -5),
        (6, "<f", 0.5), (7, "<?", True), (10, "<Q", 1 << 63), (11, "<q", -1), (12, "<d", 0.1),
    ]}  # fmt: skip
    pairs = [pair(f"n{kind}", kind, value) for kind, value in values.items()]
    pairs += [pair(f"a{kind}", 9, array(kind, 2, 2 * value)) for kind, value in values.items()]
    found = GgufFile.open(RawGguf(version=struct.pack("<I", 2), pairs=pairs).write(path)).metadata
    reader = gguf.GGUFReader(path)
    for kind in values:
        assert found[f"n{kind}"] == reader.fields[f"n{kind}"].contents()
        assert found[f"a{kind}"].tolist() == 2 * [found[f"n{kind}"]]


def test_type_table_is_that_of_the_gguf_package() -> None:
    theirs = {kind.value: (kind.name, *GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {**theirs, 42: ("Q2_0", 64, 18)} == GGML_TYPES  # ggml has it, gguf 0.19 doesn't yet


def test_alignment_and_gaps_between_tensors(path: Path) -> None:
    pairs = [ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 64))]
    infos = [tensor_info("b", [2], 0, 128), tensor_info("a", [2], 0, 0)]
    data = struct.pack("<2f", 1, 2) + bytes(120) + struct.pack("<2f", 3, 4)
    found = GgufFile.open(RawGguf(pairs=pairs, tensors=infos, alignment=64, data=data).write(path))
    assert found.data("a").view("<f4").tolist() == [1, 2]
    assert found.data("b").view("<f4").tolist() == [3, 4]


def test_missing_empty_and_folder(path: Path, tmp_path: Path) -> None:
    refused(path, "does not exist", "expected a GGUF model")
    path.touch()
    refused(path, "is empty")
    refused(tmp_path, "can't read")


@pytest.mark.parametrize("content", [b"G", b"PK\x03\x04", b"ggjt" + bytes(100)])
def test_wrong_magic(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    refused(path, "expected b'GGUF'", "not a GGUF file")


@pytest.mark.parametrize(
    ("version", "parts"),
    [(b"\1\0\0\0", ("version 1", "2 or 3")), (b"\4\0\0\0", ("version 4",)), (b"\0\0\0\3", ("big-endian",))],
)
def test_version(version: bytes, parts: tuple[str, ...], path: Path) -> None:
    refused(RawGguf(version=version).write(path), *parts)


def test_truncated_anywhere(path: Path) -> None:
    write_gguf(
        path,
        {"general.architecture": "llama", "list": ["a", "bc"], "numbers": [1, 2, 3]},
        {"x": np.zeros(64, np.float32)},
    )
    content = path.read_bytes()
    for size in range(1, len(content)):
        path.write_bytes(content[:size])
        refused(path, "cut short" if size >= 4 else "GGUF")


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (RawGguf(pair_count=1 << 60), ("metadata pairs", "cut short or damaged")),
        (RawGguf(tensor_count=1 << 63), ("tensors", "cut short or damaged")),
        (RawGguf(pairs=[pair("k", 9, array(8, 1 << 62, b""))]), ("strings in k",)),
        (RawGguf(pairs=[pair("k", 9, array(4, 1 << 62, b""))]), ("values in k",)),
        (RawGguf(pairs=[pair("k", 8, struct.pack("<Q", 1 << 63))]), ("k ends at",)),
        (RawGguf(pairs=[pair("k", 9, array(8, 2, text("a") + struct.pack("<Q", 1 << 63)))]), ("k ends at",)),
        (RawGguf(pairs=[pair("k", 9, array(8, 2, text("abcdefgh")))], alignment=1), ("k ends at",)),
        (RawGguf(pairs=[pair(b"\xff", 4, bytes(4))]), ("a metadata key is not UTF-8",)),
        (RawGguf(pairs=[pair("k", 8, text(b"\xff"))]), ("k is not UTF-8",)),
        (RawGguf(pairs=[pair("k", 9, array(8, 1, text(b"\xff")))]), ("k holds text that is not UTF-8",)),
        (RawGguf(pairs=[pair("", 4, bytes(4))]), ("a metadata key is ''",)),
        (RawGguf(pairs=[pair("a\nb", 4, bytes(4))]), ("a metadata key is 'a\\nb'",)),
        (RawGguf(pairs=[ARCHITECTURE, ARCHITECTURE]), ("general.architecture is there twice",)),
        (RawGguf(pairs=[pair("k", 13, bytes(4))]), ("value type 13",)),
        (RawGguf(pairs=[pair("k", 9, array(9, 1, array(4, 1, bytes(4))))]), ("k is an array of arrays",)),
        (RawGguf(pairs=[pair("k", 9, array(77, 1, bytes(99)))]), ("k is an array of the value type 77",)),
        (RawGguf(pairs=[pair("general.alignment", 4, struct.pack("<I", 48))]), ("general.alignment is 48",)),
        (RawGguf(pairs=[pair("general.alignment", 4, bytes(4))]), ("general.alignment is 0",)),
        (RawGguf(pairs=[pair("general.alignment", 8, text("32"))]), ("general.alignment is '32'",)),
    ],
)
def test_broken_metadata(raw: RawGguf, parts: tuple[str, ...], path: Path) -> None:
    refused(raw.write(path), *parts)


@pytest.mark.parametrize(
    ("infos", "parts"),
    [
        ([tensor_info("x\x1b[2J", [4], 0, 0)], ("a tensor's name is",)),
        ([tensor_info("x", [], 0, 0), bytes(32)], ("x has 0 dimensions",)),
        ([tensor_info("x", [1] * 5, 0, 0)], ("x has 5 dimensions",)),
        ([tensor_info("x", [4], 0, 0, dimensions=1 << 31)], ("x has 2147483648 dimensions",)),
        ([tensor_info("x", [4, 0], 0, 0)], ("x of type F32", "no empty dimension")),
        ([tensor_info("x", [100, 3], 41, 0)], ("x of type Q1_0 has rows of 100", "multiple of 128")),
        ([tensor_info("x", [4], 99, 0)], ("x has ggml type 99",)),
        ([tensor_info("x", [4], 31, 0)], ("x has ggml type 31",)),  # Q4_0_4_4, since removed from ggml
        ([tensor_info("x", [4], 0, 4)], ("x has the offset 4", "multiple of 32")),
        ([tensor_info("x", [4], 0, 64)], ("x ends at", "cut short")),
        ([tensor_info("x", [4], 0, 1 << 63)], ("x ends at",)),
        ([tensor_info("x", [1 << 63, 1 << 63, 4, 4], 0, 0)], ("x ends at",)),
        ([tensor_info("x", [4], 0, 0), tensor_info("x", [4], 0, 32)], ("x is there twice",)),
        ([tensor_info("x", [12], 0, 0), tensor_info("y", [4], 0, 32)], ("y lies where x does",)),
    ],
)
def test_broken_tensors(infos: list[bytes], parts: tuple[str, ...], path: Path) -> None:
    refused(RawGguf(tensors=infos, data=bytes(64)).write(path), *parts)


def test_a_file_that_shrinks_after_it_was_opened(path: Path) -> None:
    found = GgufFile.open(write_gguf(path, {"general.architecture": "llama"}, {"x": np.zeros(4096, np.float32)}))
    path.write_bytes(path.read_bytes()[:200])
    with raises_line(ModelFileError, "x", str(path)):
        found.data("x")


def test_metadata_values_have_their_type() -> None:
    metadata = {"i": 3, "f": 0.5, "b": True, "s": "text", "l": ["a"], "n": np.zeros(2)}
    assert metadata_value(metadata, "i", int) == 3
    assert metadata_value(metadata, "i", float) == 3.0
    assert metadata_value(metadata, "none", int, 7) == 7
    assert metadata_value(metadata, "none", str) is None
    for key, kind in [("b", int), ("i", bool), ("s", float), ("l", str), ("n", list), ("s", np.ndarray), ("b", float)]:
        with raises_line(ModelFileError, f"{key} is", "expected"):
            metadata_value(metadata, key, kind)
