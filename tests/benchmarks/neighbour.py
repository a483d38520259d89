"""`make bench-neighbour ONNX=model.onnx`: what decode loses when another process keeps one core busy.

For each number of threads, quiet and busy take turns: decode for a while alone, then beside a process that computes
without pause, which the scheduler may put on any core. More threads than cores is one of the rows, to show that no more
than cores are used. Printed are medians, the spread, and busy ÷ quiet; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from fbiedge.bench import Spread
from fbiedge.cpu import default_threads
from fbiedge.machine import describe_machine
from fbiedge.session import Session

SECONDS, SETTLE = 2.0, 0.3


@contextmanager
def busy_neighbour() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        sleep(SETTLE)
        yield
    finally:
        process.kill()
        process.wait()
        sleep(SETTLE)


def decode_speed(session: Session) -> float:
    """tok/s over SECONDS, near depth 0."""
    tokens, started = 0, perf_counter()
    while (elapsed := perf_counter() - started) < SECONDS:
        if session.position >= 128:
            session.truncate(0)
        session.forward([tokens % 1000])
        tokens += 1
    return tokens / elapsed


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    cores = default_threads()
    machine = describe_machine()
    print(f"{arguments.model} on {machine.cpu}, {machine.cores} cores, {machine.date}, commit {machine.commit}")
    print(f"{'threads':>8}{'quiet tok/s':>24}{'busy tok/s':>24}{'busy ÷ quiet':>14}")
    rows: list[dict[str, Any]] = []
    for threads in sorted({1, cores, 2 * cores}):
        session = Session.open(arguments.model, threads=threads)
        decode_speed(session)
        quiet, busy = [], []
        for _ in range(arguments.repetitions):
            quiet.append(decode_speed(session))
            with busy_neighbour():
                busy.append(decode_speed(session))
        alone, beside = Spread.of(quiet), Spread.of(busy)
        ratio = beside.median / alone.median
        rows.append(
            {
                "threads": threads,
                "threads_used": session.threads,
                "quiet": asdict(alone),
                "busy": asdict(beside),
                "ratio": ratio,
            }
        )
        texts = [f"{s.median:.0f} ({s.minimum:.0f}–{s.maximum:.0f})" for s in (alone, beside)]
        print(f"{threads:>8}{texts[0]:>24}{texts[1]:>24}{ratio:>14.2f}", flush=True)
        del session
    print(json.dumps({"model": str(arguments.model), "machine": asdict(machine), "rows": rows}))


if __name__ == "__main__":
    main()
