"""The library as a file: what it exports, where it is found, and one error for each way in which it can't be used."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.errors import raises_line
from support.native import documented_names, exported_names

from fbiedge import ops_library
from fbiedge.errors import OpLibraryError


@pytest.mark.skipif(sys.platform != "linux", reason="nm -D reads ELF")
def test_exactly_the_documented_symbols_are_exported() -> None:
    assert len(documented_names()) == 8
    assert exported_names(ops_library.library_path()) == documented_names() | {"RegisterCustomOps"}


def test_version_is_that_of_the_package() -> None:
    assert ops_library.version() == version("fbiedge")


def test_the_active_kernel_is_the_best_one_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FBIEDGE_ISA", raising=False)
    assert ops_library.active_isa() == ops_library.available_isas()[0]
    for isa in ops_library.available_isas():
        monkeypatch.setenv("FBIEDGE_ISA", isa)
        assert ops_library.active_isa() == isa


def test_a_forced_kernel_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FBIEDGE_ISA", "sse9")
    with raises_line(OpLibraryError, "FBIEDGE_ISA is 'sse9'", "scalar"):
        ops_library.active_isa()


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", str(tmp_path / "none.so"))
    with raises_line(OpLibraryError, "no op library at", "none.so", "FBIEDGE_OPS_LIBRARY"):
        ops_library.library_path()


def test_a_file_that_is_not_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("not a library\n")
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", str(path))
    with raises_line(OpLibraryError, "can't load the op library", "text.so"):
        ops_library.version()


def test_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that loads but isn't ours: a module of Python's own."""
    import _ctypes

    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", _ctypes.__file__)
    with raises_line(OpLibraryError, "can't load the op library", "fbiedge_version"):
        ops_library.version()
