"""The C++ example of runtime_ops/examples: built as an app would, it generates the ids that the Python runtime does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.bundled import MODEL, PROMPT
from support.native import SOURCE, build, call, onnxruntime_library
from support.tiny_model import tiny_model

from fbiedge import ops_library
from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the libraries' names are those of Linux")
TOKENS = 48


def build_example(folder: Path, installed: Path, *options: str) -> Path:
    """The program, built against the ONNX Runtime of the Python package."""
    options = (f"-DCMAKE_PREFIX_PATH={installed}", f"-DONNXRUNTIME_LIBRARY={onnxruntime_library()}", *options)
    return build(folder, *options, source=SOURCE / "examples") / "generate"


@pytest.fixture(scope="module")
def generate(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_example(tmp_path_factory.mktemp("example"), installed)


@pytest.fixture(scope="module")
def exact_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with a float cache."""
    return tiny_model(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return Tokenizer.from_model(Session.open(MODEL, threads=1).model).encode(PROMPT)


def by_python(model: Path, prompt: list[int], tokens: int) -> list[int]:
    session = Session.open(model, threads=1)
    ids = [int(np.argmax(session.forward(prompt)))]
    while len(ids) < tokens:
        ids.append(int(np.argmax(session.forward(ids[-1:]))))
    return ids


def by_example(program: Path, model: Path, library: str, prompt: list[int], tokens: int, *options: str) -> list[int]:
    output = call(program, *options, model, library, str(tokens), *map(str, prompt))
    ids, speed = output.splitlines()
    assert re.fullmatch(r"prompt \d+ tok/s, decode \d+ tok/s", speed)
    return [int(id) for id in ids.split(" ")]


def fails(program: Path, *arguments: str | Path) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("threads", ["1", "2"])
def test_it_generates_what_the_python_runtime_does(generate: Path, prompt: list[int], threads: str) -> None:
    expected = by_python(MODEL, prompt, TOKENS)
    library = str(ops_library.library_path())
    assert by_example(generate, MODEL, library, prompt, TOKENS, "--threads", threads) == expected
    assert by_example(generate, MODEL, "linked", prompt, TOKENS, "--threads", threads) == expected


def test_with_a_float_cache(generate: Path, exact_model: Path) -> None:
    prompt = list(range(3, 23))
    assert by_example(generate, exact_model, "linked", prompt, 30) == by_python(exact_model, prompt, 30)


def test_a_prompt_of_several_chunks(generate: Path, prompt: list[int]) -> None:
    long = (prompt * 40)[:300]
    assert by_example(generate, MODEL, "linked", long, 8) == by_python(MODEL, long, 8)


def test_without_the_op_library(
    generate: Path, exact_model: Path, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both run on the stock operators that the file carries."""
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", "/nonexistent")
    assert by_example(generate, MODEL, "none", prompt, TOKENS) == by_python(MODEL, prompt, TOKENS)
    assert by_example(generate, exact_model, "none", [1, 2], 20) == by_python(exact_model, [1, 2], 20)


def test_linked_statically(installed: Path, prompt: list[int], tmp_path: Path) -> None:
    program = build_example(tmp_path, installed, "-DLINK_STATICALLY=ON")
    assert "fbiedge_ops" not in call("readelf", "-d", program)
    assert by_example(program, MODEL, "linked", prompt, TOKENS) == by_python(MODEL, prompt, TOKENS)


def test_errors_are_one_line(generate: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(MODEL.read_bytes()[:1000])
    assert "usage: generate " in fails(generate)
    assert "usage: generate " in fails(generate, MODEL, "linked", "8")
    assert "MAX_TOKENS is '0', expected a number from 1" in fails(generate, MODEL, "linked", "0", "1")
    assert "ID is '-1'" in fails(generate, MODEL, "linked", "8", "-1")
    assert "ID is '1x'" in fails(generate, MODEL, "linked", "8", "1x")
    assert "--threads is 'two'" in fails(generate, "--threads", "two", MODEL, "linked", "8", "1")
    assert "token id 2048 is not in the vocabulary of 2048" in fails(generate, MODEL, "linked", "8", "2048")
    assert "513 tokens, more than the model's context of 512" in fails(generate, MODEL, "linked", "512", "1")
    assert "missing.onnx" in fails(generate, tmp_path / "missing.onnx", "linked", "8", "1")
    assert "damaged.onnx" in fails(generate, damaged, "linked", "8", "1")
    assert "missing.so" in fails(generate, MODEL, tmp_path / "missing.so", "8", "1")


def test_a_model_of_another_kind(generate: Path, tmp_path: Path) -> None:
    from support.binary_matmul import op_model, problem

    path = tmp_path / "other.onnx"
    path.write_bytes(op_model(problem(1, 16, 32, "row"), accuracy_level=1).SerializeToString())
    assert "expected one of `fbiedge export`" in fails(generate, path, "linked", "8", "1")
