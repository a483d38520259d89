"""One configuration of `fbiedge bench`, in a process of its own so that its memory can be told from the others'.

    python -m fbiedge.bench_worker '{"model": …, "threads": …, "accuracy_level": …, "depth": …, "tokens": …}'

Loads the model, fills the cache to `depth`, and writes a line of JSON: how long that took and what runs. Then every
line of stdin, `prefill`, `decode` or `memory`, is answered with a line of JSON; the end of stdin ends it.
An error is a line {"error": class, "message": text}, and the end.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from .engines import import_engine, is_gguf, open_session
from .errors import FbiEdgeError
from .machine import peak_rss_bytes


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes stdin
    try:
        _serve(json.loads(sys.argv[1]))
    except FbiEdgeError as error:
        _answer({"error": type(error).__name__, "message": str(error)})


def _serve(settings: dict[str, Any]) -> None:
    depth, tokens = settings["depth"], settings["tokens"]
    path = Path(settings["model"])
    import_engine(path)
    started = perf_counter()
    session = open_session(
        path,
        threads=settings["threads"],
        accuracy_level=settings["accuracy_level"],
        # llama.cpp writes to all of its cache at the start, ours takes the memory that is used.
        context=depth + tokens if is_gguf(path) else None,
    )
    loaded = perf_counter()
    # Which tokens doesn't matter to the speed, except that an embedding row must not always be the one in the cache.
    generator = np.random.default_rng(0)
    ids = [int(token) for token in generator.integers(0, session.config.vocab_size, depth + tokens)]
    session.forward(ids[:1])
    first = perf_counter()
    session.truncate(0)
    if depth:
        session.forward(ids[:depth])
    _answer(
        {
            "load_seconds": loaded - started,
            "first_token_seconds": first - loaded,
            "threads": session.threads,
            "engine": session.description,
            "kv_cache": session.kv_cache,
            "isa": session.isa,
            "accuracy_level": session.accuracy_level,
            "fallback_reason": session.fallback_reason,
        }
    )
    for command in map(str.strip, sys.stdin):
        if command == "memory":
            _answer({"peak_rss_bytes": peak_rss_bytes()})
            continue
        session.truncate(depth)
        session.forward(ids[depth : depth + 1])  # wakes the threads; belongs to no measurement
        session.truncate(depth)
        started = perf_counter()
        if command == "prefill":
            session.forward(ids[depth:])
        else:
            for token in ids[depth:]:
                session.forward([token], copy=False)  # as chat does
        _answer({"seconds": perf_counter() - started})


def _answer(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
