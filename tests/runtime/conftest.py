"""Tiny models that the runtime's tests share, whose files are written once and never changed; and the command line."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_model import CHAT_TEMPLATE, tiny_model

from fbiedge import cli

NO_LIBRARY = "/nonexistent/libfbiedge_ops.so"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template. Its checkpoint lies beside it as `checkpoint`."""
    return tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template and a context of 512."""
    folder = tmp_path_factory.mktemp("chat")
    return tiny_model(folder, chat_template=CHAT_TEMPLATE, max_position_embeddings=512)


@pytest.fixture(scope="session")
def external_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights lie in a file of their own."""
    return tiny_model(tmp_path_factory.mktemp("external"), export={"embed_limit_bytes": 0})


@pytest.fixture(params=["library", "fallback"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sessions run on the op library, or on stock ops because there is none."""
    if request.param == "fallback":
        monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", NO_LIBRARY)
    return str(request.param)


@pytest.fixture
def fbiedge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """fbiedge(*arguments, stdin=None) -> exit code, stdout, stderr."""

    def run(*arguments: object, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((stdin or "").encode())))
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fbiedge.cli", *map(str, arguments)],
        check=False, capture_output=True, text=True, timeout=300, **options,  # type: ignore[call-overload]
    )  # fmt: skip


def one_error_line(result: tuple[int, str, str]) -> str:
    """The message of a failed command, which is one line on stderr and nothing on stdout."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err
