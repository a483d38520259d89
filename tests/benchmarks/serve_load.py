"""Many clients at a time against `fbiedge serve`: what they get, how soon, and whether memory stays flat.

    python tests/benchmarks/serve_load.py [MODEL] [--clients 32] [--seconds 60]

Every client asks one streamed question after another: half the questions share a long beginning, lengths and seeds vary.
An answer that the queue is full is no error: the client waits as Retry-After says. Every other answer must be a whole
stream: a finish_reason, the usage, `[DONE]`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.bundled import MODEL, UNSEEN_STORY
from support.server import RunningServer

from fbiedge.machine import describe_machine

STARTS = ("The dog", "One day", "Mia had a", "Tom said", "The sun", "Mom and Dad")


@dataclass
class Seen:
    """What all clients saw."""

    first: list[float] = field(default_factory=list)  # seconds to the first token of each answer
    speeds: list[float] = field(default_factory=list)  # tok/s of each answer from its first token on
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answers: int = 0
    queue_full: int = 0
    errors: list[str] = field(default_factory=list)


async def ask(http: httpx.AsyncClient, body: dict[str, Any], seen: Seen) -> None:
    """One question and its whole answer."""
    started = time.perf_counter()
    first = ended = 0.0
    done, reason, usage = False, None, None
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code == 429:
            seen.queue_full += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))
            return
        if answer.status_code != 200:
            seen.errors.append(f"status {answer.status_code}: {(await answer.aread())[:200]!r}")
            return
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    seen.errors.append(str(event["error"]))
                    return
                usage = event["usage"] or usage
                for choice in event["choices"]:
                    reason = choice["finish_reason"] or reason
                    if choice["text"]:
                        ended = time.perf_counter()
                        first = first or ended
    if not done or reason is None or usage is None:
        seen.errors.append(f"a stream without its end: done {done}, finish_reason {reason}, usage {usage}")
        return
    seen.answers += 1
    seen.tokens += usage["completion_tokens"]
    seen.prompt_tokens += usage["prompt_tokens"]
    seen.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
    if first:
        seen.first.append(first - started)
        if ended > first:
            seen.speeds.append((usage["completion_tokens"] - 1) / (ended - first))


async def client(url: str, number: int, until: float, seen: Seen) -> None:
    """Questions until the time is over."""
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        while time.monotonic() < until:
            beginning = UNSEEN_STORY + " " if chance.random() < 0.5 else ""
            body = {
                "prompt": beginning + chance.choice(STARTS), "max_tokens": chance.choice([16, 48, 96]), "stream": True,
                "stream_options": {"include_usage": True}, "temperature": chance.choice([0, 0.8]),
                "seed": chance.randrange(1000),
            }  # fmt: skip
            try:
                await ask(http, body, seen)
            except (httpx.HTTPError, ValueError) as error:
                seen.errors.append(f"{type(error).__name__}: {error}")


async def watch(server: RunningServer, until: float, resident: list[int]) -> None:
    """Memory, once a second."""
    while time.monotonic() < until:
        resident.append(server.resident_bytes())
        await asyncio.sleep(1)


async def load(server: RunningServer, clients: int, seconds: float) -> tuple[Seen, list[int]]:
    """All clients at a time -> what they saw, and the server's memory second by second."""
    seen, resident = Seen(), list[int]()
    until = time.monotonic() + seconds
    asking = (client(server.url, number, until, seen) for number in range(clients))
    await asyncio.gather(watch(server, until, resident), *asking)
    return seen, resident


def measure(model: Path, clients: int, seconds: float, options: list[str]) -> dict[str, Any]:
    """The whole benchmark -> its last line."""
    with RunningServer(model, *options) as server:
        started = time.monotonic()
        seen, resident = asyncio.run(load(server, clients, seconds))
        took = time.monotonic() - started
    # The first third fills caches and pools; from then on memory must not grow.
    settled = resident[len(resident) // 3 :]
    return {
        "clients": clients, "seconds": round(took, 1), "answers": seen.answers, "queue_full": seen.queue_full,
        "errors": len(seen.errors), "first_errors": seen.errors[:3],
        "tokens_per_second": round(seen.tokens / took, 1),
        "cached_share": round(seen.cached_tokens / max(1, seen.prompt_tokens), 3),
        "first_token_p50_ms": percentile(seen.first, 50, 1e3), "first_token_p95_ms": percentile(seen.first, 95, 1e3),
        "answer_tokens_per_second_p50": percentile(seen.speeds, 50), "answer_tokens_per_second_p5": percentile(seen.speeds, 5),
        "resident_mb": {"first": resident[0] / 1e6, "settled": settled[0] / 1e6, "last": resident[-1] / 1e6,
                        "growth": round((resident[-1] - settled[0]) / 1e6, 1)},
        "server": server.lines[0], "machine": vars(describe_machine()),
    }  # fmt: skip


def percentile(values: list[float], share: float, scale: float = 1.0) -> float | None:
    """None where there are no values."""
    return round(float(np.percentile(values, share)) * scale, 1) if values else None


def main() -> int:
    """0 where nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--options", default="", help="more options of fbiedge serve, such as '--slots 8'")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.clients, arguments.seconds, arguments.options.split())
    print(f"{found['clients']} clients, {found['seconds']} s: {found['answers']} whole answers, "
          f"{found['queue_full']} told that the queue is full, {found['errors']} errors")  # fmt: skip
    print(f"first token p50 {found['first_token_p50_ms']} ms, p95 {found['first_token_p95_ms']} ms; "
          f"all answers together {found['tokens_per_second']} tok/s, one p50 {found['answer_tokens_per_second_p50']} tok/s, "
          f"p5 {found['answer_tokens_per_second_p5']} tok/s; {found['cached_share']:.0%} of prompts cached")  # fmt: skip
    memory = found["resident_mb"]
    print(
        f"memory {memory['first']:.0f} MB at first, {memory['settled']:.0f} after a third, {memory['last']:.0f} MB last"
    )
    print(json.dumps(found))
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
