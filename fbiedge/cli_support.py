"""What several commands need: texts that a user names, and packages that may be missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .errors import UsageError


def read_text(path: Path) -> str:
    """The text in `path`. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the text {path}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a missing package into the extra of this distribution that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "fbiedge":
            raise
        raise UsageError(f"this needs {error.name}, which isn't installed: pip install 'fbiedge[{name}]'") from error
