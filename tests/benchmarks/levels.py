"""`make bench-levels MODEL=CHECKPOINT TEXT=FILE`: what accuracy levels, heads, KV caches and kernels cost, and what they bring.

Perplexity and KL divergence are taken on the same windows of TEXT, as long as the context, which don't overlap. The
reference is the numpy model with the checkpoint's own fp32 head. Speed: tok/s on one thread, median of some repetitions in
turns; decode feeds 64 tokens one by one at depth 0. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.evaluation import encode
from fbiedge.exporters.onnx import export_onnx
from fbiedge.metrics import compare_logits, perplexity
from fbiedge.ops_library import active_isa, available_isas
from fbiedge.reference import Reference
from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer
from fbiedge.weights import open_checkpoint

LEVELS, HEADS, KV_CACHES = ("int8", "fp32"), ("int8", "int4", "fp32"), ("int8", "fp32")
STOCK = "stock ops"
PROMPT, GENERATED = 128, 64


@dataclass(frozen=True)
class Engine:
    """What a row of the table ran."""

    level: str
    head: str
    kv_cache: str
    kernels: str  # an ISA, or STOCK

    @property
    def file(self) -> str:
        return f"{self.level}-{self.head}-{self.kv_cache}.onnx"


def engines() -> list[Engine]:
    """All options on the best kernels, then the default and the exact one on the others; the default is the first."""
    best, *others = available_isas()
    chosen = [Engine(*options, best) for options in itertools.product(LEVELS, HEADS, KV_CACHES)]
    return chosen + [Engine(*options, isa) for isa in (*others, STOCK) for options in (("int8",) * 3, ("fp32",) * 3)]


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Sessions opened here run on these kernels."""
    settings = {"FBIEDGE_OPS_LIBRARY": "/nonexistent"} if name == STOCK else {"FBIEDGE_ISA": name}
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def speeds(sessions: Sequence[Session], ids: Sequence[int], repetitions: int) -> list[tuple[float, float]]:
    """Prefill and decode of each, in tok/s."""
    samples: list[list[tuple[float, float]]] = [[] for _ in sessions]
    for _ in range(repetitions):
        for session, taken in zip(sessions, samples, strict=True):
            taken.append((_timed(session, [ids[:PROMPT]]), _timed(session, [[token] for token in ids[:GENERATED]])))
    return [(median(p for p, _ in taken), median(d for _, d in taken)) for taken in samples]


def _timed(session: Session, steps: Sequence[Sequence[int]]) -> float:
    session.truncate(0)
    session.forward(steps[0][:1])
    session.truncate(0)
    started = perf_counter()
    for step in steps:
        session.forward(step)
    return sum(map(len, steps)) / (perf_counter() - started)


def main() -> None:
    """Print a Markdown table and one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()

    weights = open_checkpoint(arguments.checkpoint)
    reference = Reference(weights)
    length = weights.config.max_position_embeddings
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for engine in engines():
            path = Path(folder) / engine.file
            if not path.exists():
                options = {"accuracy_level": engine.level, "head": engine.head, "kv_cache": engine.kv_cache}
                export_onnx(weights, path, **options)  # type: ignore[arg-type]
            with kernels(engine.kernels):
                sessions.append(Session.open(path, threads=1))
        model = sessions[0].model
        ids = encode(Tokenizer.from_model(model), arguments.text.read_text(encoding="utf-8"), model.config.vocab_size)
        windows = [ids[i : i + length] for i in range(0, len(ids) - length, length)][: arguments.windows]
        targets = np.concatenate([window[1:] for window in windows])

        def exact(window: list[int]) -> npt.NDArray[np.float32]:
            reference.reset()
            return reference.logits(window)

        expected = np.concatenate([exact(window)[:-1] for window in windows])
        base = perplexity(expected, targets)
        for engine, session, speed in zip(
            engines(), sessions, speeds(sessions, ids, arguments.repetitions), strict=True
        ):
            logits = np.concatenate([_logits(session, window)[:-1] for window in windows])
            difference = compare_logits(expected, logits)
            rows.append(
                {
                    "level": engine.level, "head": engine.head, "kv_cache": engine.kv_cache, "kernels": engine.kernels,
                    "perplexity": perplexity(logits, targets), "kl_divergence": difference.kl_divergence,
                    "top1_agreement": difference.top1_agreement, "prefill": speed[0], "decode": speed[1],
                }
            )  # fmt: skip
    print(f"{len(targets)} tokens, reference perplexity {base:.4f}, best kernels {active_isa()}\n")
    print("| activations | head | KV cache | kernels | perplexity | | KL, nats | same top token | prefill | decode |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['level']} | {row['head']} | {row['kv_cache']} | {row['kernels']} | {row['perplexity']:.4f} "
            f"| {100 * (row['perplexity'] / base - 1):+.3f} % | {row['kl_divergence']:.1e} "
            f"| {100 * row['top1_agreement']:.2f} % | {row['prefill']:.0f} | {row['decode']:.0f} |"
        )
    print(
        json.dumps({"checkpoint": str(arguments.checkpoint), "tokens": len(targets), "perplexity": base, "rows": rows})
    )


def _logits(session: Session, window: list[int]) -> npt.NDArray[np.float32]:
    session.truncate(0)
    return session.all_logits(window)


if __name__ == "__main__":
    main()
