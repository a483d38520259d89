"""Damaged model files and prompt caches: readers refuse them or read what is within, and commands end in one line.

`make fuzz` runs the second for longer, with other seeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fuzz.targets import Target, damage, targets

from fbiedge.engines import open_session
from fbiedge.errors import FbiEdgeError
from fbiedge.exporters.gguf.reader import open_gguf
from fbiedge.exporters.onnx import open_onnx
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_model import open_gguf_model
from fbiedge.model_file import ModelFile
from fbiedge.prompt_cache import PromptCache
from fbiedge.tokenizer import Tokenizer
from fbiedge.weights import Weights, open_checkpoint

FUZZ = Path(__file__).with_name("run.py")
SECONDS = 20  # the whole file stays below a minute
DAMAGES = 120  # of each target


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    """Every target."""
    return targets(tmp_path_factory.mktemp("sound"))


def read_gguf(path: Path) -> None:
    file = GgufFile.open(path)
    for name, tensor in file.tensors.items():
        assert file.data(name).nbytes == tensor.nbytes <= file.file_bytes
    read_weights(open_gguf(path))
    model = open_gguf_model(path)
    if "tokenizer" in model.metadata:
        Tokenizer.from_model(model).encode("ab abc")


def read_onnx(path: Path) -> None:
    model = ModelFile.open(path)
    model.json_object("generation_config")
    if "tokenizer" in model.metadata:
        Tokenizer.from_model(model).encode("ab abc")
    read_weights(open_onnx(path))


def read_weights(weights: Weights) -> None:
    for name in weights.config.linear_shapes():
        weights.linear(f"model.layers.0.{name}")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        weights.tensor(name)


def read_cache(path: Path) -> None:
    session = open_session(path, threads=1)
    PromptCache(path.with_name(f"{path.name}.cache"), session)
    session.truncate(min(session.position, session.capacity - 1))
    session.forward([5])  # on whatever rows were taken


READERS: dict[str, Callable[[Path], object]] = {
    "onnx": read_onnx,
    "gguf": read_gguf,
    "cache": read_cache,
    "checkpoint": lambda path: read_weights(open_checkpoint(path)),
}


@pytest.mark.parametrize("kind", READERS)
def test_readers_refuse_or_read(kind: str, found: list[Target], tmp_path: Path) -> None:
    """A few milliseconds a case, as nothing or a token is run; every error is one of ours, in one line."""
    outcomes = set()
    for target in found:
        if not target.name.startswith(kind):
            continue
        for case in range(DAMAGES):
            files, what = damage(target, found, Random(f"read {target.name} {case}"))
            for name, content in files.items():
                (tmp_path / name).write_bytes(content)
            try:
                READERS[kind](tmp_path / target.opened)
                outcomes.add("read")
            except FbiEdgeError as error:
                assert "\n" not in str(error), (target.name, case, what)
                outcomes.add("refused")
            except Exception as error:
                raise AssertionError(f"{target.name} {case}: {what}") from error
        for name in target.files:
            (tmp_path / name).unlink()
    assert outcomes == {"read", "refused"}


@pytest.mark.skipif(sys.platform != "linux", reason="cases are forked, with limits that only Linux has")
def test_commands_end_in_one_line_and_never_crash(tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ), "--seconds", str(SECONDS), "--save", str(tmp_path / "findings")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20 * SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["findings"] == 0
    assert set(document["outcomes"]) == {"read", "refused"}
    assert len(document["targets"]) == 14
