"""How much memory a piece of work takes at most: resident bytes on a CPU, allocated bytes on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_PAGE = 4096


@dataclass
class Peak:
    before: int  # bytes, at the start
    most: int = 0  # until the end


@contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[Peak]:
    """`with peak_memory() as peak: …`: of this process, looked at every 2 ms; on a GPU what PyTorch counted."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        peak = Peak(torch.cuda.memory_allocated())
        yield peak
        peak.most = torch.cuda.max_memory_allocated()
        return
    peak = Peak(_resident_bytes())
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.most = max(peak.most, _resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
