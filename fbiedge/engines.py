"""Which engine runs a model, by what the model is:

    model.onnx      ONNX Runtime with the op library                 session.Session
    model.gguf      llama.cpp, through llama-cpp-python              llama_cpp_session.LlamaCppSession
    a checkpoint    numpy, the slow and obvious one (logits only)    reference.Reference
                    transformers, where that knows no such model     huggingface_engine.HuggingFaceLogits

Sessions of both kinds are a `CachedSession`, so chat, generate and bench don't know which one they drive.
`open_logits` gives all of them one face for whatever wants the logits of a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .cached_session import CachedSession
from .errors import UsageError
from .model_file import ModelFile
from .tokenizer import Tokenizer

GGUF_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """By its name or, whatever its name, by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:  # absent, or a folder: whoever opens it says so
        return False


def is_checkpoint(path: Path) -> bool:
    """A folder with a config.json and no exported model."""
    return path.is_dir() and not (path / "model.onnx").is_file() and (path / "config.json").is_file()


def open_model(path: Path) -> ModelFile:
    """What the model.onnx or model.gguf at `path` says about itself. Raises ModelFileError."""
    if is_gguf(path):
        from .gguf_model import open_gguf_model

        return open_gguf_model(path)
    return ModelFile.open(path)


def import_engine(path: Path) -> None:
    """Import what `open_session` needs for `path`, which takes longer than opening a small model. Raises UsageError."""
    if is_gguf(path):
        from .llama_cpp_library import load_library

        load_library()
    else:
        from . import session  # noqa: F401


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    accuracy_level: str | None = None,
    context: int | None = None,
) -> CachedSession:
    """A session of the engine for `path`; the options are those of Session.open and LlamaCppSession.open.

    Raises ModelFileError, UsageError.
    """
    if is_gguf(path):
        from .llama_cpp_session import LlamaCppSession

        if accuracy_level is not None:
            raise UsageError(
                f"--accuracy-level {accuracy_level} can't be had for {path}: llama.cpp chooses how a GGUF is computed; "
                "leave the option away, or export the model to ONNX"
            )
        return LlamaCppSession.open(path, threads=threads, context=context)
    from .session import Session

    return Session.open(path, threads=threads, accuracy_level=accuracy_level, context=context)


class LogitEngine(Protocol):
    """A model that gives the logits of every position of a text."""

    @property
    def path(self) -> Path: ...
    @property
    def vocab_size(self) -> int:
        """Tokens that have logits."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        ...

    @property
    def description(self) -> str:
        """What computes, in a few words."""
        ...

    @property
    def warning(self) -> str | None: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, of which there must be so many."""
        ...

    def feed(self, ids: Sequence[int]) -> None:
        """Append `ids`, whose logits nobody wants."""
        ...

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append `ids` -> logits [len(ids), vocab], row t for the token after ids[t]."""
        ...


def open_logits(path: Path, *, tokens: int, threads: int | None = None) -> LogitEngine:
    """The engine for `path`, with room for `tokens`, or as many as the model takes.

    `threads` has no meaning for a checkpoint that numpy runs, which shares out its products itself. Raises CheckpointError, ModelFileError,
    UsageError.
    """
    if is_checkpoint(path):
        from .huggingface_engine import HuggingFaceLogits, unknown_architecture

        if (name := unknown_architecture(path)) is not None:
            return HuggingFaceLogits(path, name, tokens=tokens, threads=threads)
        return ReferenceLogits(path)
    context = min(tokens, open_model(path).config.max_position_embeddings)
    return SessionLogits(path, open_session(path, threads=threads, context=context))


def tokenizer_of(files: Mapping[str, str]) -> Tokenizer | None:
    """The tokenizer among the files of a checkpoint, None where there is none. Raises CheckpointError, ModelFileError."""
    from .weights import json_sidecar

    if "tokenizer.json" not in files:
        return None
    special, config = (json_sidecar(files, name) for name in ("special_tokens_map.json", "tokenizer_config.json"))
    return Tokenizer(files["tokenizer.json"], special | config)


class SessionLogits:
    """LogitEngine of a session."""

    def __init__(self, path: Path, session: CachedSession) -> None:
        self.path = path
        self.vocab_size = session.vocab_size
        self.capacity = session.capacity
        self.description = session.description
        self.warning = session.warning
        self._session = session
        self.tokenizer = Tokenizer.from_model(session.model) if "tokenizer" in session.model.metadata else None

    def reset(self) -> None:
        """See LogitEngine."""
        self._session.truncate(0)

    def truncate(self, length: int) -> None:
        """See LogitEngine."""
        self._session.truncate(length)

    def feed(self, ids: Sequence[int]) -> None:
        """See LogitEngine."""
        self._session.forward(ids)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See LogitEngine."""
        return self._session.all_logits(ids)


class ReferenceLogits:
    """LogitEngine of a checkpoint, FBI-LLM's or any Llama of Hugging Face."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError, ModelFileError for an unusable tokenizer."""
        from .reference import RESIDENT_LIMIT_BYTES, Reference
        from .weights import expected_shapes, open_checkpoint

        weights = open_checkpoint(path)
        self.path = path
        self.vocab_size = weights.config.vocab_size
        self.capacity = weights.config.max_position_embeddings
        dense_bytes = 4 * sum(int(np.prod(shape)) for shape in expected_shapes(weights.config).values())
        self._reference = Reference(weights, resident=dense_bytes <= RESIDENT_LIMIT_BYTES)
        self.description = "numpy reference, fp32"
        self.warning = None
        self.tokenizer = tokenizer_of(weights.files)

    def reset(self) -> None:
        """See LogitEngine."""
        self._reference.reset()

    def truncate(self, length: int) -> None:
        """See LogitEngine."""
        self._reference.truncate(length)

    def feed(self, ids: Sequence[int]) -> None:
        """See LogitEngine."""
        self._reference.logits(ids)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See LogitEngine."""
        rows: npt.NDArray[np.float32] = self._reference.logits(ids)
        return rows
