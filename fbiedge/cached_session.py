"""What every session does the same way, whoever computes: it knows which tokens its KV cache holds.

Rows of the cache count up to `position` only, so forgetting tokens is free. A subclass runs a chunk of tokens, `_run`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import ModelConfig
from .cpu import default_threads
from .errors import UsageError
from .kv_cache import Precision
from .model_file import ModelFile

CHUNK = 128  # tokens of one prefill step: enough to keep the kernels busy; logits of 128 x 32,000 take 16 MB


class CachedSession(ABC):
    """One model with one KV cache, for one conversation at a time."""

    # Of the op library alone; None where something else computes.
    isa: str | None = None  # the kernels in use
    accuracy_level: str | None = None
    fallback_reason: str | None = None  # why the op library, which is wanted, doesn't run

    def __init__(self, model: ModelFile, *, capacity: int, threads: int) -> None:
        self.model = model
        self.capacity = capacity  # tokens
        self.threads = threads
        self._tokens: list[int] = []

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.model.config

    @property
    def vocab_size(self) -> int:
        """Tokens that have logits."""
        return self.config.vocab_size

    @property
    @abstractmethod
    def description(self) -> str:
        """What computes, in a few words."""

    @property
    def warning(self) -> str | None:
        """What a user should know before the answers, such as why they come slowly."""
        return None

    @property
    @abstractmethod
    def kv_cache(self) -> Precision:
        """How keys and values are held."""

    @property
    def position(self) -> int:
        """Tokens in the cache, which is the position of the next."""
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return tuple(self._tokens)

    def forward(self, ids: Sequence[int], *, copy: bool = True) -> npt.NDArray[np.float32]:
        """Append `ids` to the cache -> logits [vocab] for the token after the last.

        Without `copy` they are valid until the next run, which writes over them; that saves 40 us of 32,000 logits.
        Raises UsageError where the ids don't fit, and then appends none.
        """
        self._check(ids)
        for start in range(0, len(ids), CHUNK):
            rows = self._run(ids[start : start + CHUNK], keep=1)
        last: npt.NDArray[np.float32] = rows[-1]
        return last.copy() if copy else last

    def all_logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append `ids` to the cache -> logits [len(ids), vocab], row t for the token after ids[t]. Raises UsageError."""
        self._check(ids)
        chunks = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
        return np.concatenate([self._run(chunk, keep=len(chunk)).copy() for chunk in chunks])

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises UsageError where there are fewer."""
        if not 0 <= length <= self.position:
            raise UsageError(f"can't truncate the cache to {length} tokens, it holds {self.position}")
        del self._tokens[length:]

    def reuse(self, ids: Sequence[int]) -> int:
        """Keep of the cache what `ids` begin with, but never all of `ids` -> tokens of `ids` that need no forward().

        At least one is left to forward, because its logits are not kept.
        """
        common = self.shared(ids)
        self.truncate(common)
        return common

    def shared(self, ids: Sequence[int]) -> int:
        """Tokens that reuse() would keep."""
        common = 0
        for cached, wanted in zip(self._tokens, ids[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        return common

    @abstractmethod
    def sibling(self) -> CachedSession:
        """A session of the same weights, which are in memory once, with an empty cache of its own.

        Siblings are for many conversations at a time, not for many threads: one runs at a time. Raises UsageError
        where memory is short.
        """

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the model is made of."""
        return (self.model.path, *(self.model.path.with_name(name) for name in sorted(self.model.external_bytes)))

    @abstractmethod
    def rows(self) -> Iterator[npt.NDArray[Any]]:
        """Keys and values of the tokens in the cache, for `restore` of a session of the same kind."""

    def restore(self, ids: Sequence[int], rows: memoryview) -> None:
        """Have `ids` in the cache, with the keys and values that `rows()` gave. Raises UsageError; the cache is then empty."""
        self.truncate(0)
        self._check(ids)
        self._restore(len(ids), rows)
        self._tokens.extend(ids)

    @abstractmethod
    def _restore(self, count: int, rows: memoryview) -> None:
        """Take the keys and values of `count` tokens. Raises UsageError where they are none of this session's."""

    @abstractmethod
    def _run(self, ids: Sequence[int], keep: int) -> npt.NDArray[np.float32]:
        """One step of 1 to CHUNK tokens, which are then in `_tokens` -> the last `keep` rows of logits [keep, vocab],
        valid until the next run; `keep` is 1 or len(ids)."""

    def _check(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise UsageError("no tokens to run; give a prompt")
        if self.position + len(ids) > self.capacity:
            before = f" after {self.position} in the cache" if self.position else ""
            raise UsageError(f"prompt of {len(ids)} tokens{before} is longer than the context of {self.capacity}")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise UsageError(f"token ids run from {min(ids)} to {max(ids)}, expected 0 to {self.config.vocab_size - 1}")


def threads_to_use(threads: int | None) -> int:
    """As many as cores when None, and at most so many: more only wait for one another. Raises UsageError."""
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"threads is {threads}, expected a number from 1 to 1024")
    return min(threads or default_threads(), default_threads())


def check_context(context: int | None, config: ModelConfig) -> None:
    """Raises UsageError where a cache of `context` tokens is none or more than the model was made for."""
    longest = config.max_position_embeddings
    if context is not None and not 1 <= context <= longest:
        raise UsageError(f"context is {context}, expected a number from 1 to {longest}, the context of this model")
