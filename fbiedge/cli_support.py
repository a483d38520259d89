"""What several commands need: the model and the texts that a user names, and packages that may be missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from .cached_session import CachedSession


def read_text(path: Path, most: int | None = None) -> str:
    """The text in `path`, of at most so many characters. Raises UsageError; no more is read than is needed for that."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(-1 if most is None else most + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the text {path}: {getattr(error, 'strerror', None) or error}") from error
    if most is not None and len(text) > most:
        raise UsageError(f"{path} is too long, expected at most {most:,} characters")
    return text


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a missing package into the extra of this distribution that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "fbiedge":
            raise
        raise UsageError(f"this needs {error.name}, which isn't installed: pip install 'fbiedge[{name}]'") from error


def open_model(
    model: Path | None, threads: int | None, accuracy_level: str | None, context: int | None
) -> CachedSession:
    """A session of `model`, or of the bundled one, after a warning where something is not as it should be."""
    from . import terminal
    from .engines import open_session

    path = model or bundled_model()
    session = open_session(path, threads=threads, accuracy_level=accuracy_level, context=context)
    if session.warning:
        terminal.print_warning(session.warning)
    if accuracy_level not in (None, session.accuracy_level):
        terminal.print_warning(
            f"--accuracy-level {accuracy_level} has no effect on stock ops, which compute as the file says: "
            f"{session.accuracy_level}; export it with --accuracy-level {accuracy_level}"
        )
    return session


def bundled_model() -> Path:
    """The model that comes with fbiedge. Raises UsageError where it doesn't."""
    import importlib.resources

    path = Path(str(importlib.resources.files("fbiedge") / "models" / "default.onnx"))
    if not path.is_file():
        raise UsageError("this installation has no bundled model; give the path of a model.onnx")
    return path
