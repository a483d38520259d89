"""Token shards: flat files of token ids that are mapped into memory, never read whole.

    NAME.tokens        the ids, uint16 or uint32, little-endian, one after the other
    NAME.tokens.json   dtype          "uint16" | "uint32"
                       tokens         how many ids the file must hold
                       largest_id     so that a model with a smaller vocabulary is refused without reading them
                       sample_length  ids of one sample (Amber: 2049), which windows never cross; 0: one stream

Shards of a folder are read in the order of their names. Each is written under a temporary name, so that a killed
preparation leaves only whole ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from fbiedge.errors import UsageError
from fbiedge.files import atomic_file

SUFFIX = ".tokens"
SHARD_TOKENS = 1 << 28  # after which the next shard begins: 512 MB of uint16

Ids = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An open shard."""

    path: Path
    tokens: Ids  # [tokens], memory-mapped
    sample_length: int = 0  # 0: one stream
    largest_id: int | None = None  # None: written before this was noted


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Writes ids into shards of about `shard_tokens`: `with ShardWriter(...) as writer: writer.add(ids)`.

    A shard ends between two calls of `add` and appears when it is whole.
    """

    def __init__(self, folder: Path, dtype: npt.DTypeLike, shard_tokens: int = SHARD_TOKENS, prefix: str = "") -> None:
        self.folder, self.dtype, self.shard_tokens, self.prefix = folder, dtype, shard_tokens, prefix
        self.sample_length = 0  # of the shards that begin from now on
        self.written: list[int] = []  # ids of each shard
        self._open = ExitStack()
        self._add: Callable[[Ids], int] | None = None

    def add(self, ids: Ids) -> None:
        """Append `ids` [any]. Raises OutputError."""
        if self._add is None:
            path = self.folder / f"{self.prefix}{len(self.written):05}{SUFFIX}"
            self._add = self._open.enter_context(_new_shard(path, self.dtype, self.sample_length))
            self.written.append(0)
        self.written[-1] = self._add(ids)
        if self.written[-1] >= self.shard_tokens:
            self.end_shard()

    def end_shard(self) -> None:
        """What is added next goes into another shard."""
        self._open.close()
        self._add = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)


def write_shard(path: Path, arrays: Iterable[Ids], dtype: npt.DTypeLike, sample_length: int = 0) -> int:
    """Write the ids of `arrays`, one after the other, as the one shard `path`; returns how many."""
    total = 0
    with _new_shard(path, dtype, sample_length) as add:
        for ids in arrays:
            total = add(ids)
    return total


def open_shard(path: Path) -> Shard:
    """The shard, mapped into memory. Raises UsageError where it is missing, no shard or of another length than noted."""
    try:
        header = json.loads(header_path(path).read_text())
        dtype, tokens = np.dtype(header["dtype"]).newbyteorder("<"), int(header["tokens"])
        sample_length, largest = int(header.get("sample_length", 0)), header.get("largest_id")
        if dtype.kind != "u" or tokens < 0 or sample_length < 0 or not isinstance(largest, int | None):
            raise ValueError("unusable header")
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a token shard ({error}); make it again from the text files") from error
    if size != tokens * dtype.itemsize:
        found = size // dtype.itemsize
        raise UsageError(f"{path}: {found} tokens found, {tokens} expected; make it again from the text files")
    mapped = np.memmap(path, dtype, "r", shape=(tokens,)) if tokens else np.empty(0, dtype)
    return Shard(path=path, tokens=mapped, sample_length=sample_length, largest_id=largest)


def open_shards(folder: Path) -> list[Shard]:
    """Every shard of `folder`, in the order of their names. Raises UsageError, also where one of 00000… is missing."""
    names = sorted({path.name.removesuffix(".json") for path in folder.glob(f"*{SUFFIX}*") if path.name[0] != "."})
    numbered = [int(name.removesuffix(SUFFIX)) for name in names if name.removesuffix(SUFFIX).isdecimal()]
    if numbered and (missing := sorted(set(range(max(numbered))) - set(numbered))):
        raise UsageError(f"{folder} lacks the shard {missing[0]:05}{SUFFIX}; copy it there or make the shards again")
    return [open_shard(folder / name) for name in names]


def remove_shards(folder: Path, but: Collection[str] = ()) -> None:
    """Remove the shards of `folder`, except where the name begins with one of `but`."""
    for path in folder.glob(f"*{SUFFIX}*"):
        if path.name[0] != "." and not path.name.startswith(tuple(but)):
            path.unlink()


def header_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


@contextmanager
def _new_shard(path: Path, dtype: npt.DTypeLike, sample_length: int) -> Iterator[Callable[[Ids], int]]:
    """Yields what appends ids and returns how many there are by then."""
    total, largest, stored = 0, 0, np.dtype(dtype).newbyteorder("<")
    with atomic_file(path) as temporary:
        with open(temporary, "wb") as shard:

            def add(ids: Ids) -> int:
                nonlocal total, largest
                shard.write(ids.astype(stored, copy=False).tobytes())
                total += ids.size
                largest = max(largest, int(ids.max(initial=0)))
                return total

            yield add
        header = {
            "dtype": np.dtype(dtype).name,
            "tokens": total,
            "largest_id": largest,
            "sample_length": sample_length,
        }
        with atomic_file(header_path(path)) as temporary_header:
            temporary_header.write_text(json.dumps(header))
