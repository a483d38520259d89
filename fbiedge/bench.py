"""`fbiedge bench`: speed of prefill and decode, memory, load time, and how near decode comes to the memory's speed.

Every configuration (threads × prefill or decode at a depth) is a process of its own, loaded once; then they take turns,
A B C A B C …, so that a machine that gets slower or busier is so for all of them. Reported are medians, and the spread
from the slowest to the fastest repetition. Nothing is sampled: `decode` feeds given tokens one by one.

Weights read by a token = bits and scales of all layers, norms, head, and one row of the embedding and of each RoPE
table, as stored in the file. The KV cache comes on top and is counted apart. Read bandwidth is that of a plain loop
(read_speed.py). It runs between the configurations, over private memory, which Linux backs with huge pages, and over
the mapped model file, whose pages are small as those of the weights are. A GGUF is mapped whole; where llama.cpp
repacks weights into memory of its own, as it does on some machines, it reads copies of the same size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from . import errors
from .config import ModelConfig
from .cpu import default_threads
from .engines import is_gguf, open_model
from .errors import FbiEdgeError, UsageError
from .inspection import Inspection, inspect
from .kv_cache import cache_bytes
from .machine import Machine, describe_machine
from .model_file import ModelFile
from .read_speed import ReadLoop, bring_into_page_cache

DEFAULT_DEPTHS = (0, 512, 1024)
WORKER = (sys.executable, "-m", "fbiedge.bench_worker")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure. Tokens are counts; `depths` are tokens in the cache when decoding begins.

    depths: None takes those of 0, 512, 1024 that fit. threads: None takes 1 and one for each core.
    """

    prompt_tokens: int = 128
    gen_tokens: int = 64
    depths: tuple[int, ...] | None = None
    threads: tuple[int, ...] | None = None
    repetitions: int = 5
    accuracy_level: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a number that can't be."""
        for name, values, least in (
            ("prompt-tokens", (self.prompt_tokens,), 1),
            ("gen-tokens", (self.gen_tokens,), 1),
            ("repetitions", (self.repetitions,), 1),
            ("depth", (0,) if self.depths is None else self.depths, 0),
            ("threads", (1,) if self.threads is None else self.threads, 1),
        ):
            if not values or min(values) < least or len(set(values)) < len(values):
                given = ",".join(map(str, values))
                raise UsageError(f"--{name} is {given!r}, expected whole numbers of at least {least}, none twice")

    def for_context(self, context: int) -> BenchOptions:
        """With all defaults filled in. Raises UsageError where something doesn't fit in `context` tokens."""
        depths = self.depths
        if depths is None:
            depths = tuple(depth for depth in DEFAULT_DEPTHS if depth + self.gen_tokens <= context) or (0,)
        if self.prompt_tokens > context:
            raise UsageError(f"--prompt-tokens {self.prompt_tokens} is more than this model's context of {context}")
        for depth in depths:
            if depth + self.gen_tokens > context:
                raise UsageError(
                    f"--depth {depth} and --gen-tokens {self.gen_tokens} don't fit in this model's context of {context}"
                )
        threads = self.threads or tuple(sorted({1, default_threads()}))
        return BenchOptions(**{**asdict(self), "depths": depths, "threads": threads})


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, slowest and fastest of some repetitions."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median=median(values), minimum=min(values), maximum=max(values))


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Plain reading by some threads, in GB/s."""

    threads: int
    memory: Spread
    mapped_file: Spread | None  # None where the weights are not mapped


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One configuration."""

    kind: str  # "prefill" or "decode"
    threads: int
    threads_used: int  # at most the cores of the machine
    depth: int  # tokens in the cache at the start
    tokens: int  # of one repetition
    tokens_per_second: Spread
    weights_gb_per_second: float | None  # decode on our kernels only: prefill is bound by arithmetic
    share_of_bandwidth: (
        float | None
    )  # of plainly reading the same memory (the mapped file, if mapped) by as many threads
    kv_cache_bytes: (
        int  # of the tokens at the middle of a repetition: read by each decoded token, on top of the weights
    )
    peak_rss_bytes: int | None  # of a process that did only this, weights included
    load_seconds: float  # opening the session, the file being in the page cache; Python's imports are not in it
    first_token_seconds: float  # of one token on the fresh session: the weights are mapped in here


@dataclass(frozen=True, kw_only=True)
class Step:
    """Progress."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All that was measured in one run, and on what."""

    model: str
    config: ModelConfig
    options: BenchOptions
    engine: str  # what computes, in a few words
    isa: str | None  # None on the stock-ops fallback and in llama.cpp
    accuracy_level: str | None  # None in llama.cpp, which chooses by the weights' types
    fallback_reason: str | None
    weight_bytes_per_token: int | None  # None on the fallback, which reads other bytes than the file holds
    bandwidth: tuple[Bandwidth, ...]
    measurements: tuple[Measurement, ...]
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def weight_bytes_per_token(inspection: Inspection) -> int:
    """Bytes of the model file that decoding one token reads: everything but most rows of the tables."""
    rows = {"rope": inspection.config.max_position_embeddings}
    if any(group.group == "head" for group in inspection.groups):  # else the embedding is read whole, as the head
        rows["embedding"] = inspection.config.vocab_size
    return sum(group.bytes // rows.get(group.group, 1) for group in inspection.groups)


def bench(path: Path, options: BenchOptions) -> Iterator[Step | BenchReport]:
    """Measure the model at `path`; the last event is the report. Raises UsageError, ModelFileError and what a worker met."""
    model = open_model(path)
    options = options.for_context(model.config.max_position_embeddings)
    machine = describe_machine()
    depths, threads = options.depths or (), options.threads or ()
    mapped = [model.path] if is_gguf(path) else [model.path.parent / name for name in model.external_bytes]
    plan = [
        (count, kind, depth) for kind, depth in (("prefill", 0), *(("decode", d) for d in depths)) for count in threads
    ]
    total = len(plan) * (1 + options.repetitions)
    for file in [model.path, *mapped]:
        bring_into_page_cache(file)
    with ExitStack() as stack:
        workers: list[Worker] = []
        seconds: list[list[float]] = [[] for _ in plan]
        for done, (count, kind, depth) in enumerate(plan):
            yield Step(done=done, total=total)
            tokens = options.prompt_tokens if kind == "prefill" else options.gen_tokens
            settings = {
                "model": str(model.path), "accuracy_level": options.accuracy_level,
                "threads": count, "depth": depth, "tokens": tokens,
            }  # fmt: skip
            workers.append(Worker(settings))
            stack.callback(workers[-1].close)
        loop = ReadLoop(mapped)
        speeds: dict[int, list[tuple[float, float | None]]] = {count: [] for count in threads}
        for repetition in range(options.repetitions):
            for index, (_, kind, _) in enumerate(plan):
                yield Step(done=len(plan) * (1 + repetition) + index, total=total)
                seconds[index].append(float(workers[index].ask(kind)["seconds"]))
            for count in threads:
                used = min(count, default_threads())
                speeds[count].append((loop.memory(used), loop.mapped_file(used)))
        peaks = [worker.ask("memory")["peak_rss_bytes"] for worker in workers]
    bandwidth = {count: _bandwidth(count, samples) for count, samples in speeds.items()}
    started = workers[0].started
    weights = None if started["fallback_reason"] else weight_bytes_per_token(inspect(model.path))
    measurements = [
        _measurement(model, options, *entry, worker.started, samples, peak, weights, bandwidth[entry[0]])
        for entry, worker, samples, peak in zip(plan, workers, seconds, peaks, strict=True)
    ]
    yield BenchReport(
        model=str(model.path),
        config=model.config,
        options=options,
        engine=started["engine"],
        isa=started["isa"],
        accuracy_level=started["accuracy_level"],
        fallback_reason=started["fallback_reason"],
        weight_bytes_per_token=weights,
        bandwidth=tuple(bandwidth.values()),
        measurements=tuple(measurements),
        machine=machine,
    )


def _measurement(
    model: ModelFile,
    options: BenchOptions,
    threads: int,
    kind: str,
    depth: int,
    started: dict[str, Any],
    seconds: Sequence[float],
    peak: int | None,
    weights: int | None,
    bandwidth: Bandwidth,
) -> Measurement:
    tokens = options.prompt_tokens if kind == "prefill" else options.gen_tokens
    speed = Spread.of([tokens / value for value in seconds])
    gigabytes = weights * speed.median / 1e9 if weights is not None and kind == "decode" else None
    return Measurement(
        kind=kind,
        threads=threads,
        threads_used=started["threads"],
        depth=depth,
        tokens=tokens,
        tokens_per_second=speed,
        weights_gb_per_second=gigabytes,
        share_of_bandwidth=None
        if gigabytes is None
        else gigabytes / (bandwidth.mapped_file or bandwidth.memory).median,
        kv_cache_bytes=cache_bytes(model.config, started["kv_cache"], depth + tokens // 2),
        peak_rss_bytes=peak,
        load_seconds=started["load_seconds"],
        first_token_seconds=started["first_token_seconds"],
    )


def _bandwidth(threads: int, samples: Sequence[tuple[float, float | None]]) -> Bandwidth:
    mapped = [speed for _, speed in samples if speed is not None]
    return Bandwidth(
        threads=threads,
        memory=Spread.of([speed for speed, _ in samples]),
        mapped_file=Spread.of(mapped) if mapped else None,
    )


class Worker:
    """A process of fbiedge.bench_worker, or of a program that answers as it does; `started` is its first answer.

    Its errors are raised here as what they were; FbiEdgeError where it died.
    """

    def __init__(self, settings: dict[str, Any], program: Sequence[str] = WORKER) -> None:
        """`settings` as bench_worker describes them."""
        self._name = f"the benchmark's process of {settings['threads']} threads at depth {settings['depth']}"
        command = [*program, json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.started = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, command: str) -> dict[str, Any]:
        """Let it do `command` -> its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; reading says how
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise FbiEdgeError(f"{self._name} {how}; is there enough memory?")
        answer = cast(dict[str, Any], json.loads(line))
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
