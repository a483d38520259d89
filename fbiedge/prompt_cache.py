"""The KV cache of a prompt in a file, so that the same beginning of a prompt is not run again by another process.

    cache = PromptCache(Path("story.cache"), session)    # takes what the file has, if there is one
    for event in cache.keep(generate(session, ...)):     # writes the prompt when it has run, where the file lacks it

Keys and values say nothing outside the model, the kernels and the precision that made them, so the file says whose they
are, and is refused by any other. It is (little-endian):

    8 bytes    FBICACHE
    uint32     bytes of the header
    header     JSON: version, model, engine, kv_cache, tokens
    int32[]    ids of the tokens
    bytes      keys and values, as the session gives them
    uint32     CRC-32 of all that is before

The check sum finds damage, not malice: a cache from a stranger deserves as much trust as a model from one.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .cached_session import CachedSession
from .errors import UsageError
from .files import atomic_file, real_target
from .generate import Event, PromptProgress
from .model_file import load_json

_MAGIC = b"FBICACHE"
_VERSION = 1
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each file of a model, to tell it from another


class PromptCache:
    """A file for the prompts of one session."""

    def __init__(self, path: Path, session: CachedSession) -> None:
        """Takes the tokens of the file into the session's cache, where there is a file.

        Raises UsageError for a file that is damaged or not this session's, OutputError for what can be no file.
        """
        self.path = path
        self._session = session
        self._identity = _identity(session)
        self._saved: tuple[int, ...] = ()
        if real_target(path, "a file").exists():
            self._load()

    def keep(self, events: Iterable[Event]) -> Iterator[Event]:
        """The `events` of a generation; its prompt is written where it has run. Raises OutputError."""
        kept = False
        for event in events:
            if not kept and not isinstance(event, PromptProgress):
                kept = True
                self._save()
            yield event

    def _save(self) -> None:
        ids = self._session.tokens
        if not ids or self._saved[: len(ids)] == ids:
            return
        header = json.dumps({**self._identity, "tokens": len(ids)}).encode()
        start: list[Any] = [_MAGIC, struct.pack("<I", len(header)), header, np.array(ids, "<i4")]
        checksum = 0
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            for part in chain(start, self._session.rows()):
                file.write(part)
                checksum = zlib.crc32(part, checksum)
            file.write(struct.pack("<I", checksum))
        self._saved = ids

    def _load(self) -> None:
        try:
            with self.path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise UsageError(
                        f"{self.path} is no prompt cache; give the name of one, or of a file that doesn't exist"
                    )
                content = memoryview(file.read())
        except OSError as error:
            raise UsageError(f"can't read the prompt cache {self.path}: {error.strerror or error}") from error
        try:
            if zlib.crc32(content[:-4], zlib.crc32(_MAGIC)) != struct.unpack_from("<I", content, len(content) - 4)[0]:
                raise ValueError
            (size,) = struct.unpack_from("<I", content)
            header = load_json(bytes(content[4 : 4 + size]).decode())
            tokens = header["tokens"]
            if type(tokens) is not int or not 0 <= tokens <= len(content) // 4:
                raise ValueError
            ids = tuple(np.frombuffer(content, "<i4", tokens, 4 + size).tolist())
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"the prompt cache {self.path} is damaged or cut short; delete it") from error
        self._check(header, tokens)
        try:
            self._session.restore(ids, content[4 + size + 4 * tokens : -4])
        except UsageError as error:
            raise UsageError(f"the prompt cache {self.path} can't be used: {error}; delete it") from error
        self._saved = ids

    def _check(self, header: dict[str, Any], tokens: int) -> None:
        instead = "delete it or give another file"
        for key, whose in (("version", "version"), ("model", "model"), ("engine", "engine"), ("kv_cache", "precision")):
            if header.get(key) != self._identity[key]:
                was = header.get(key) if key != "model" else header.get("name")
                now = self._identity[key if key != "model" else "name"]
                names = f"{was}, this is {now}" if was != now else f"of the same name, {now}"
                raise UsageError(f"the prompt cache {self.path} is of another {whose} ({names}); {instead}")
        if tokens > self._session.capacity:
            raise UsageError(
                f"the prompt cache {self.path} holds {tokens} tokens, more than the context of {self._session.capacity}; "
                f"{instead}"
            )


def _identity(session: CachedSession) -> dict[str, Any]:
    """Whose keys and values these are. Blocks all over its files tell a model from one of the same shape."""
    digest = hashlib.blake2b(digest_size=16)
    for path in session.files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return {
        "version": _VERSION,
        "name": session.model.path.name,
        "model": digest.hexdigest(),
        "engine": session.description,
        "kv_cache": session.kv_cache,
    }
