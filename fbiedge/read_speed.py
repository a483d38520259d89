"""How fast this machine reads memory: the bound of decoding, which reads all weights for every token.

A plain loop, `bitwise_or` over an array far larger than the caches: NumPy vectorises it and releases the GIL, and it
reaches what a loop of 512-bit loads in C does (29.5 against 29.4 GB/s on one Zen 4 core).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt

from .machine import memory_bytes

_READ_BYTES = 256 << 20  # larger than any cache we know of but some servers'
_READ_SECONDS = 0.05  # of one measurement: long beside starting threads, short beside the rest


class ReadLoop:
    """Reads memory, and mapped files, as fast as plain loads can. Speeds are GB/s."""

    def __init__(self, files: Sequence[Path], size: int | None = None) -> None:
        size = size or min(_READ_BYTES, (memory_bytes() or _READ_BYTES * 8) // 8)
        self._memory = np.ones(size // 8, np.uint64)  # ones, because untouched zeros would all be one page
        self._mapped = [array for file in files if len(array := _mapped_words(file))]

    def memory(self, threads: int) -> float:
        """Over private memory."""
        return _read_speed([self._memory], threads)

    def mapped_file(self, threads: int) -> float | None:
        """Over the files; None where there are none."""
        return _read_speed(self._mapped, threads) if self._mapped else None


def _mapped_words(file: Path) -> npt.NDArray[np.uint64]:
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, np.uint64, count=len(mapped) // 8)


def _read_speed(arrays: Sequence[npt.NDArray[np.uint64]], threads: int) -> float:
    """Each thread reads its part of each array, several times over -> GB/s of all."""
    parts = [[np.array_split(array, threads)[index] for array in arrays] for index in range(threads)]
    size = sum(array.nbytes for array in arrays)

    def read(part: list[npt.NDArray[np.uint64]], passes: int) -> None:
        for _ in range(passes):
            for words in part:
                np.bitwise_or.reduce(words)

    with ThreadPoolExecutor(threads) as pool:
        seconds, passes = 0.0, 1
        for warm in (True, False):
            started = perf_counter()
            list(pool.map(read, parts, [passes] * threads))
            seconds = perf_counter() - started
            if warm:  # starts the threads and maps the pages, and says how long a pass takes
                passes = max(1, round(_READ_SECONDS / seconds))
    return passes * size / seconds / 1e9


def bring_into_page_cache(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        block = bytearray(1 << 20)
        while opened.readinto(block):
            pass
