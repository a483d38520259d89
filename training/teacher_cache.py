"""RUN/teacher/: what the teacher said to each window, so that later epochs read it instead of asking again.

    RANK.features    a record for each window: [sequence_length, hidden] features, bf16 or fp32 as the loss reads them
    RANK.keys        as many entries: 16 bytes of a hash of the teacher's head and the window, 4 of the record's CRC

Features, what the teacher's head sees, are its whole distribution in `hidden` numbers a token, whatever the vocabulary.
A window is found by its ids, so every epoch must cut the text alike (Batches, `same_windows`). A record is written
before its entry, and one that isn't whole is as good as none, so a kill costs no more than the windows of a step; what
is read is what was computed, bit for bit, so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import os
import shutil
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fbiedge.errors import OutputError, UsageError

from .parallel import Team, agreed, is_first, spread, whole

_HASH, _CRC = 16, 4
_ENTRY = _HASH + _CRC


class CachedTeacher:
    """A teacher that is asked once: `features(ids)` [B, T, hidden] and `lm_head.weight` [V, hidden], as teachers have.

    Each process writes a file of its own and reads those of all. Where one of them lacks a window all ask, as a spread
    teacher answers all at once.
    """

    def __init__(self, teacher: Any, folder: Path, here: Team, *, length: int, windows: int, bf16: bool) -> None:
        """For `windows` of `length` tokens. Raises UsageError where the disk has no room for them, and OutputError."""
        self.teacher, self.folder, self.here = teacher, folder, here
        self.lm_head = _whole_head(teacher, here)
        head = self.lm_head.get_parameter("weight")  # [V, hidden]
        self.shape = length, head.shape[1]
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self._bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        self._salt = blake2b(_raw(head), digest_size=_HASH).digest()
        self._entries, self._records = folder / f"{here.rank}.keys", folder / f"{here.rank}.features"
        self._places: dict[bytes, tuple[Path, int, int]] = {}  # hash of a window -> file, record number, CRC
        self._known: dict[Path, int] = {}  # how many entries of each file are in _places
        with agreed():
            try:
                self._open()
            except OSError as error:
                raise self._refused(error) from error
        self._index()  # after all have opened theirs
        with agreed():
            lacking = (windows - len(self._places)) * self._bytes
            if lacking > (free := shutil.disk_usage(folder).free):
                raise UsageError(
                    f"the teacher's features of {windows} windows need {lacking / 1e9:.1f} GB more in {folder}, where "
                    f"{free / 1e9:.1f} GB are free; make room, or begin another run without --cache-teacher"
                )

    def features(self, ids: Tensor) -> Tensor:
        """What the head sees, in the dtype that the loss rounds it to. Raises OutputError."""
        keys = [blake2b(self._salt + _raw(row), digest_size=_HASH).digest() for row in ids]
        if any(key not in self._places for key in keys):
            self._index()  # another process may have asked since
        rows = [self._read(key) for key in keys]
        lacking = torch.tensor([any(row is None for row in rows)], dtype=torch.float64, device=ids.device)
        if self.here.mean(lacking)[0] > 0:
            said: Tensor = self.teacher.features(ids).to(self.dtype)
            spread(self.teacher)
            with agreed():
                for at, (key, row) in enumerate(zip(keys, rows, strict=True)):
                    if row is None:
                        rows[at] = said[at]
                        self._append(key, _raw(said[at]))
        return torch.stack([row.to(ids.device) for row in rows if row is not None])

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self._entries, self._records):
            path.touch()
        count = min(self._entries.stat().st_size // _ENTRY, self._records.stat().st_size // self._bytes)
        os.truncate(self._entries, count * _ENTRY)
        os.truncate(self._records, count * self._bytes)

    def _index(self) -> None:
        """Learn of the entries that were written since, of this process and of others, now or in an earlier part."""
        for path in sorted(self.folder.glob("*.keys")):
            with open(path, "rb") as file:
                file.seek(self._known.get(path, 0) * _ENTRY)
                entries = file.read()
            for at in range(0, len(entries) - _ENTRY + 1, _ENTRY):
                key, crc = entries[at : at + _HASH], int.from_bytes(entries[at + _HASH : at + _ENTRY], "little")
                number = self._known.get(path, 0)
                self._places[key] = path.with_suffix(".features"), number, crc
                self._known[path] = number + 1

    def _read(self, key: bytes) -> Tensor | None:
        """A window's features [T, hidden]; None where they were never computed, or can't be read as they were."""
        if key not in self._places:
            return None
        path, number, crc = self._places[key]
        try:
            with open(path, "rb") as file:
                file.seek(number * self._bytes)
                data = bytearray(file.read(self._bytes))
        except OSError:
            return None
        if len(data) != self._bytes or zlib.crc32(data) != crc:
            return None
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)

    def _append(self, key: bytes, data: bytes) -> None:
        entry = key + zlib.crc32(data).to_bytes(_CRC, "little")
        try:
            for path, part in ((self._records, data), (self._entries, entry)):
                with open(path, "ab") as file:
                    file.write(part)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(f"can't write {self.folder}: {error.strerror}; mend that, then --resume")


def forget_answers(folder: Path, here: Team) -> None:
    """Remove a cache that no step needs any more; all processes call this together."""
    here.wait()
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)
    here.wait()


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _whole_head(teacher: Any, here: Team) -> nn.Module:
    """The teacher's head; of a spread teacher a whole copy, as nothing gathers it where the teacher isn't asked."""
    head: nn.Module = teacher.lm_head
    if here.size == 1:
        return head
    weight = whole(head.get_parameter("weight")).to(here.device)
    copy = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    copy.weight = nn.Parameter(weight, requires_grad=False)
    return copy
