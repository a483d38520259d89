"""Outputs appear whole or not at all: write to a temporary name in the same folder, flush to the disk, then rename.

Temporary names are `.NAME.HOST.PID.RANDOM.tmp`, so that what a killed process left is known as such and goes away when
the same output is written again. An output that is a symbolic link is followed: the file it points to is replaced.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import FbiEdgeError, OutputError

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # process ids mean nothing on another machine's shared disk
_KINDS = ((stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a symbolic link in a circle"))


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it replaces `target`, on any error it is removed.

    The same folder, because a rename is atomic only within one file system.
    Raises OutputError where the operating system refuses (disk full, no permission) and where `target` is no plain file.
    """
    real = real_target(target, "a file")
    temporary = _temporary(real)
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(real)
        yield temporary
        _flush(temporary)
        os.replace(temporary, real)
        _flush(real.parent)
    except OSError as error:
        raise _output_error(target, real, temporary, error) from error
    finally:
        with suppress(OSError):  # the folder itself may not exist, and must not hide the error above
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(target: Path) -> Iterator[Path]:
    """Yield the path that `target` has for now, in a temporary folder; what is written beside it goes along with it.

    For a file that names its companions and is to be tried out before it appears; it replaces `target` last, because it
    needs the others. Raises OutputError as `atomic_file` does.
    """
    real = real_target(target, "a file")
    staging = _temporary(real)
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(real)
        staging.mkdir()
        yield staging / real.name
        files = sorted(staging.iterdir(), key=lambda path: path.name == real.name)
        for path in files:
            real_target(real.with_name(path.name), "a file")
            _flush(path)
        for path in files:
            os.replace(path, real.with_name(path.name))
        _flush(real.parent)
    except OSError as error:
        raise _output_error(target, real, staging, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success its files replace `target`, on any error it is removed.

    An existing `target` is replaced as a whole. Raises OutputError as `atomic_file` does.
    """
    real = real_target(target, "a folder")
    staging = _temporary(real)
    retired = staging.with_name(staging.name + ".old")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(real)
        staging.mkdir()
        yield staging
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        if real.is_dir():
            os.replace(real, retired)
        os.replace(staging, real)
        _flush(real.parent)
    except OSError as error:
        raise _output_error(target, real, staging, error) from error
    finally:  # also where Ctrl-C came between the two renames
        _settle(real, retired)
        shutil.rmtree(staging, ignore_errors=True)


def real_target(target: Path, expected: str) -> Path:
    """Where `target` really lies. Raises OutputError where something else than `expected` (a file, a folder) is there."""
    real = Path(os.path.realpath(target))
    try:
        mode = real.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return real
    except OSError as error:
        raise OutputError(f"can't write {target}: {error.strerror}; nothing was written") from error
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a device, pipe or socket")
    if kind != expected:
        raise OutputError(f"can't write {target}: it is {kind}, expected {expected} or nothing; nothing was written")
    return real


def require_utf8(path: Path, kind: type[FbiEdgeError]) -> None:
    """Raise `kind` for a path that isn't UTF-8: ONNX files and libraries written in C++ take no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="replace")
        raise kind(f"the path {shown} is not valid UTF-8; rename it") from error


def _temporary(real: Path) -> Path:
    return real.with_name(f".{real.name}.{_HOST}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def _remove_stale(real: Path) -> None:
    """Remove what processes that were killed left of this output; a folder that was moved aside comes back."""
    if os.name != "posix":  # elsewhere a signal 0 is not harmless
        return
    prefix = f".{real.name}.{_HOST}."
    for leftover in real.parent.glob(glob.escape(prefix) + "*"):
        found = re.fullmatch(r"(\d+)\.[0-9a-f]{8}\.tmp(\.old)?", leftover.name.removeprefix(prefix))
        if found is None or _is_alive(int(found[1])):
            continue
        with suppress(OSError):  # what can't go away is in nobody's way
            if found[2]:
                _settle(real, leftover)
            elif leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _settle(real: Path, retired: Path) -> None:
    """Remove the earlier folder where the new one took its place; else put it back."""
    if real.exists():
        shutil.rmtree(retired, ignore_errors=True)
    elif retired.exists():
        os.replace(retired, real)


def _flush(path: Path) -> None:
    """To the disk: a rename can outlive a power cut that the contents didn't, which leaves an empty file."""
    if path.is_dir():
        if os.name != "posix":
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_error(target: Path, real: Path, temporary: Path, error: OSError) -> OSError | OutputError:
    """`error` in this project's words, unless it names a file that is no part of this output."""
    if isinstance(error.filename, (str, os.PathLike)):
        path = Path(os.path.abspath(error.filename))
        if path not in (real, *real.parents) and temporary.name not in path.parts:
            return error
    return OutputError(f"can't write {target}: {error.strerror or error}; nothing was left there")


def require_only(folder: Path, is_known: Callable[[Path], bool], what: str) -> None:
    """A `folder` that is to be replaced as a whole must hold nothing else than `what`. Raises OutputError."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if not is_known(entry):
            raise OutputError(f"{folder} holds {entry.name}, which is no part of {what}; choose a new folder")


def require_room(target: Path, needed: int, example: str) -> None:
    """Say at once what would fail after minutes of writing `needed` bytes. Raises OutputError."""
    if target.is_dir():
        raise OutputError(
            f"can't write {target}: it is a folder; give the name of a file, such as model{target.suffix}"
        )
    folder = next((parent for parent in target.absolute().parents if parent.is_dir()), None)
    if folder is not None and (free := shutil.disk_usage(folder).free) < needed:
        raise OutputError(
            f"can't write {target}: it needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB free; "
            "nothing was written"
        )
