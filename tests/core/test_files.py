"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.errors import raises_line

from fbiedge import files
from fbiedge.errors import OutputError, UsageError
from fbiedge.files import atomic_directory, atomic_file, atomic_files, require_utf8


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


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.EIO, "Input/output error"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_directory_comes_back_where_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    """Between the two renames the target has no name; a failure there must put the earlier folder back."""
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "a").write_text("1")
    rename = os.replace
    failures = iter([False, True])

    def failing(source: Path, destination: Path) -> None:
        if next(failures, False):
            raise error
        rename(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(raised), atomic_directory(target) as staging:
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


@pytest.mark.parametrize("opened", [atomic_file, atomic_files, atomic_directory])
@pytest.mark.parametrize("kind", ["device", "pipe", "circle"])
def test_only_its_own_kind_is_replaced(tmp_path: Path, opened, kind: str) -> None:
    """As root, renaming onto /dev/null would break the system."""
    target = tmp_path / "out"
    if kind == "device":
        target = Path("/dev/null")
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(target)
    before = target.lstat()
    with raises_line(OutputError, f"can't write {target}: it is a", "nothing was written"), opened(target):
        raise AssertionError("the block must not run")
    assert (target.lstat().st_ino, target.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ([] if kind == "device" else ["out"])


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere/real.onnx", tmp_path / "link.onnx"
    if exists:
        real.write_text("first")
    link.symlink_to(real)
    with atomic_file(link) as temporary:
        temporary.write_text("second")
        assert temporary.parent == real.parent
    assert link.is_symlink() and real.read_text() == "second"
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    with atomic_directory(tmp_path / "folder") as staging:
        (staging / "a").write_text("1")
    assert (tmp_path / "folder").is_symlink() and names(tmp_path / "elsewhere") == ["a"]


def test_files_that_belong_together_appear_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new/model.onnx"
    with atomic_files(target) as temporary:
        temporary.write_text("1")
        temporary.with_name("model.onnx.data").write_text("2")
        assert temporary.name == "model.onnx" and not target.exists()
    assert names(target.parent) == ["model.onnx", "model.onnx.data"]
    renamed: list[str] = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda source, to: (renamed.append(Path(to).name), rename(source, to)))
    with atomic_files(target) as temporary:
        temporary.write_text("1")
        temporary.with_name("model.onnx.data").write_text("2")
    assert renamed == ["model.onnx.data", "model.onnx"], "the file that needs the other comes last"
    with pytest.raises(ValueError, match="broken"), atomic_files(target) as temporary:
        temporary.write_text("half")
        raise ValueError("broken")
    assert target.read_text() == "1" and names(target.parent) == ["model.onnx", "model.onnx.data"]


def test_contents_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut can leave the new name with nothing in it."""
    events: list[str] = []
    rename, flush = os.replace, files._flush
    monkeypatch.setattr(os, "replace", lambda source, to: (events.append("rename"), rename(source, to)))
    monkeypatch.setattr(files, "_flush", lambda path: (events.append(path.name), flush(path)))
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with atomic_file(tmp_path / "out") as temporary:
        temporary.write_text("1")
    assert events == [temporary.name, "rename", tmp_path.name] and len(synced) == 2
    events.clear()
    with atomic_directory(tmp_path / "folder") as staging:
        (staging / "a").write_text("1")
    assert events == ["a", staging.name, "rename", tmp_path.name]


KILLED = """
import os, signal, sys
from pathlib import Path

from fbiedge import files
opened, target, renames = getattr(files, sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rename = os.replace
def dying(source, destination):
    global renames
    if renames == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    renames -= 1
    rename(source, destination)
os.replace = dying
with opened(target) as temporary:
    (temporary / "a" if temporary.is_dir() else temporary).write_text("half")
"""


@pytest.mark.skipif(os.name != "posix", reason="process ids are looked up by a signal")
@pytest.mark.parametrize("opened", [atomic_file, atomic_directory])
def test_what_a_killed_process_left_goes_away(tmp_path: Path, opened) -> None:
    target = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, opened.__name__, str(target), "0"], check=False)
    (left,) = names(tmp_path)
    assert left.startswith(".out.")
    alive = tmp_path / f".out.{files._HOST}.{os.getppid()}.01234567.tmp"
    alive.write_text("in use")
    with opened(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("whole")
    assert names(tmp_path) == [alive.name, "out"]


@pytest.mark.skipif(os.name != "posix", reason="process ids are looked up by a signal")
def test_a_folder_moved_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("1")
    subprocess.run([sys.executable, "-c", KILLED, "atomic_directory", str(target), "1"], check=False)
    assert not target.exists()
    with pytest.raises(ValueError, match="broken"), atomic_directory(target):
        raise ValueError("broken")
    assert names(tmp_path) == ["out"] and names(target) == ["precious"]


@pytest.mark.parametrize("opened", [atomic_file, atomic_files, atomic_directory])
def test_a_source_that_can_not_be_read_is_not_blamed_on_the_target(tmp_path: Path, opened) -> None:
    source = tmp_path / "weights"
    with pytest.raises(FileNotFoundError) as caught, opened(tmp_path / "out"):
        source.read_bytes()
    assert caught.value.filename == str(source)
    assert names(tmp_path) == []


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    require_utf8(tmp_path / "模型.onnx", UsageError)
    with raises_line(UsageError, "b\ufffd.onnx is not valid UTF-8; rename it"):
        require_utf8(Path(os.fsdecode(b"b\xff.onnx")), UsageError)
