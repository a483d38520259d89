"""A training on several processes of this machine, started as torchrun would start them, but each under its own name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Ended:
    """One process that ended."""

    code: int
    printed: str


def start(size: int, arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` on `size` processes that find each other, one thread each."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float = 600) -> list[Ended]:
    """Wait for all; none is left behind."""
    try:
        printed = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, text) for process, text in zip(processes, printed, strict=True)]
