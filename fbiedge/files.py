"""Outputs appear whole or not at all: write to a temporary name in the same folder, then rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it replaces `target`, on any error it is removed.

    The same folder, because a rename is atomic only within one file system.
    Raises OutputError where the operating system refuses (disk full, no permission).
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise _output_error(target, error) from error
    finally:
        with suppress(OSError):  # the folder itself may not exist, and must not hide the error above
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success its files replace `target`, on any error it is removed.

    An existing `target` is replaced as a whole. Raises OutputError as `atomic_file` does.
    """
    target = Path(target)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        staging.chmod(0o755)
        yield staging
        if target.is_dir():
            retired = staging.with_name(staging.name + ".old")
            os.replace(target, retired)
            try:
                os.replace(staging, target)
            except OSError:
                os.replace(retired, target)
                raise
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(staging, target)
    except OSError as error:
        raise _output_error(target, error) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _output_error(target: Path, error: OSError) -> OutputError:
    return OutputError(f"can't write {target}: {error.strerror or error}; nothing was left there")
