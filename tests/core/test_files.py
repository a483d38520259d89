"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support.errors import raises_line

from fbiedge.errors import OutputError
from fbiedge.files import atomic_directory, atomic_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_replaces_the_earlier_one_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new/folder/model.onnx"
    with atomic_file(target) as temporary:
        temporary.write_text("first")
        assert temporary.parent == target.parent, "a rename is atomic only within one file system"
        assert not target.exists()
    with atomic_file(target) as temporary:
        temporary.write_text("second")
        assert target.read_text() == "first"
    assert target.read_text() == "second"
    assert names(target.parent) == ["model.onnx"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_failed_file_leaves_the_earlier_one(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("first")
    with pytest.raises(type(error)), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "first"
    assert names(tmp_path) == ["model.onnx"]


def test_directory_replaces_the_earlier_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "new/checkpoint"
    with atomic_directory(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
    with atomic_directory(target) as staging:
        (staging / "b").write_text("2")
        assert names(target) == ["a"]
    assert names(target) == ["b"]
    assert names(target.parent) == ["checkpoint"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_failed_directory_leaves_the_earlier_one(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "a").write_text("1")
    with pytest.raises(type(error)), atomic_directory(target) as staging:
        (staging / "b").write_text("2")
        raise error
    assert names(target) == ["a"]
    assert names(tmp_path) == ["checkpoint"]


def test_directory_comes_back_where_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames the target has no name; a failure there must put the earlier folder back."""
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "a").write_text("1")
    rename = os.replace
    failures = iter([False, True])

    def failing(source: Path, destination: Path) -> None:
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with raises_line(OutputError, "Input/output error"), atomic_directory(target) as staging:
        (staging / "b").write_text("2")
    assert names(target) == ["a"]
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("opened", [atomic_file, atomic_directory])
def test_disk_full(tmp_path: Path, opened) -> None:
    message = "out: No space left on device; nothing was left"
    with raises_line(OutputError, "can't write", message), opened(tmp_path / "out") as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


@pytest.mark.parametrize("opened", [atomic_file, atomic_directory])
def test_parent_that_is_a_file(tmp_path: Path, opened) -> None:
    (tmp_path / "file").write_text("precious")
    with raises_line(OutputError, "can't write"), opened(tmp_path / "file/out"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "file").read_text() == "precious"


def test_directory_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with raises_line(OutputError, "can't write"), atomic_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
    assert (tmp_path / "out").read_text() == "precious"
    assert names(tmp_path) == ["out"]


def test_file_does_not_replace_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with raises_line(OutputError, "can't write"), atomic_file(tmp_path / "out") as temporary:
        temporary.write_text("1")
    assert names(tmp_path) == ["out"]
