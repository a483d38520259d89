"""Samples of token ids -> shards: each source on its own, several at a time in processes of their own.

A chunk of Amber takes minutes, all of them a day on one core. A source that is done leaves a note, so that the same command
after an error or a kill goes on with the others; the notes go away when all are done.
"""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from fbiedge.errors import OutputError, UsageError
from fbiedge.files import atomic_file

from .records import Corrupt, JsonLines, Records, samples
from .shards import SUFFIX, Ids, ShardWriter, open_shard, remove_shards

SHARD_TOKENS_OF_SAMPLES = 1 << 33  # a chunk of Amber, 3.5 billion, is one shard
MOST_HELD_OUT = 2048  # samples; four million tokens of Amber, whose chunks have 1.7 million samples
WORTH_PROCESSES = 1 << 26  # bytes of sources below which starting processes takes longer than it saves


@dataclass(frozen=True, kw_only=True)
class Job:
    """One source and where its shards go: `into`/NNNNN-00000.tokens and, for what is held out, `held_out`/NNNNN-…"""

    number: int
    source: Records
    into: Path
    held_out: Path | None
    vocab_size: int
    skip_corrupt: bool
    most_tokens: int | None

    @property
    def note(self) -> Path:
        return self.into / f".{self.number:05}.done"

    def fingerprint(self) -> list[Any] | None:
        """What an earlier result must have been made from to be this one; None where that can't be told."""
        if not isinstance(self.source, JsonLines):
            return None
        try:
            status = self.source.path.stat()
        except OSError:
            return None
        return [self.source.name, status.st_size, status.st_mtime_ns, self.held_out is not None, self.vocab_size,
                self.skip_corrupt, self.most_tokens]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Done:
    """Tokens of each shard of a job, and the lines it left out."""

    tokens: list[int]
    held_out: list[int]
    skipped: int


def write_sample_shards(
    into: Path, held_out: Path | None, sources: Sequence[Records], vocab_size: int, corrupt: Corrupt,
    most_tokens: int | None = None, processes: int | None = None,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Write the samples of `sources` into the folder `into`; returns the tokens of each shard there and in `held_out`.

    held_out: takes the last 2 % of the last source, 2048 samples at most; of the first, where `most_tokens` may end before
    the others. processes: by default one for each core, where there is enough to do. Raises UsageError, OutputError.
    """
    parted = len(sources) - 1 if most_tokens is None else 0

    def job(number: int, most: int | None) -> Job:
        return Job(
            number=number, source=sources[number], into=into, held_out=held_out if number == parted else None,
            vocab_size=vocab_size, skip_corrupt=corrupt.skip, most_tokens=most,
        )  # fmt: skip

    # What an attempt with other sources or with texts left.
    remove_shards(into, but=[f"{number:05}-" for number in range(len(sources))])
    if held_out is not None:
        remove_shards(held_out, but=[f"{parted:05}-"])
    done: list[Done] = []
    if most_tokens is not None:  # how many are left is known when the source before is done
        while len(done) < len(sources) and (left := most_tokens - sum(sum(one.tokens) for one in done)) > 0:
            done.append(run_job(job(len(done), left)))
    else:
        done = _run_all([job(number, None) for number in range(len(sources))], processes)
    for source, one in zip(sources, done, strict=False):
        if one.skipped:
            corrupt.counts[source.name] += one.skipped
    for number in range(len(done)):
        job(number, None).note.unlink(missing_ok=True)
    return [count for one in done for count in one.tokens], [count for one in done for count in one.held_out]


def run_job(job: Job) -> Done:
    """Write one source's shards, unless its note says that they are done and they are there."""
    fingerprint = job.fingerprint()
    try:
        noted = json.loads(job.note.read_text())
        earlier = Done(**noted["done"])
        there = [_tokens_there(job, folder) for folder in (job.into, job.held_out)]
        same = fingerprint is not None and noted["made_from"] == fingerprint
        if same and there == [earlier.tokens, earlier.held_out]:
            return earlier
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        pass
    done = _write(job)
    with atomic_file(job.note) as temporary:
        temporary.write_text(json.dumps({"made_from": fingerprint, "done": vars(done)}))
    return done


def _tokens_there(job: Job, folder: Path | None) -> list[int]:
    """Of each shard of the job in `folder`. Raises UsageError for damaged ones."""
    found = () if folder is None else sorted(folder.glob(f"{job.number:05}-*{SUFFIX}"))
    return [len(open_shard(path).tokens) for path in found]


def _write(job: Job) -> Done:
    dtype = np.uint16 if job.vocab_size <= 1 << 16 else np.uint32
    corrupt, prefix = Corrupt(skip=job.skip_corrupt), f"{job.number:05}-"
    latest, count = deque[Ids](), 0  # latest: may be held out
    most_kept = 0 if job.held_out is None else MOST_HELD_OUT
    for folder in filter(None, (job.into, job.held_out)):
        for stale in folder.glob(f"{prefix}*"):  # of an attempt that was killed
            stale.unlink()
    with (
        ShardWriter(job.into, dtype, SHARD_TOKENS_OF_SAMPLES, prefix) as train,
        ShardWriter(job.held_out or job.into, dtype, SHARD_TOKENS_OF_SAMPLES, prefix) as kept,
    ):
        for ids in samples(job.source, job.vocab_size, corrupt):
            train.sample_length = kept.sample_length = ids.size
            latest.append(ids)
            count += 1
            if len(latest) > most_kept:
                train.add(latest.popleft())
            if job.most_tokens is not None and count * ids.size >= job.most_tokens:
                break
        while len(latest) > min(most_kept, max(1, count // 50)):
            train.add(latest.popleft())
        for ids in latest:
            kept.add(ids)
    return Done(tokens=train.written, held_out=kept.written, skipped=sum(corrupt.counts.values()))


def _run_all(jobs: list[Job], processes: int | None) -> list[Done]:
    if processes is None:
        size = sum(job.source.path.stat().st_size for job in jobs if isinstance(job.source, JsonLines))
        processes = min(len(jobs), os.cpu_count() or 1) if size > WORTH_PROCESSES else 1
    if processes == 1:
        return [run_job(job) for job in jobs]
    try:
        # Spawned: the libraries loaded by now have threads. Ctrl-C reaches all; these end without a word.
        with ProcessPoolExecutor(
            processes, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
        ) as pool:
            started = [pool.submit(run_job, job) for job in jobs]
            try:
                return [one.result() for one in started]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # those under way finish, and need not be done again
                raise
    except BrokenProcessPool as error:
        raise OutputError(
            "a process that wrote token shards was killed, perhaps for want of memory; the same command goes on with "
            "the sources that are not done"
        ) from error
