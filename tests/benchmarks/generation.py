"""What the features of the generation loop cost, and what they save. `make bench-generation`, or

    python tests/benchmarks/generation.py [model.onnx | model.gguf]

Each number comes from the loop that chat, `fbiedge generate` and the server use. The last line is JSON.

* lookup: tokens per second of an answer that copies its prompt, of greedy text, which in a small model repeats itself,
  and of sampled text, which doesn't. For the copy, the logits of the token that comes next in the prompt are raised;
  all else, the time of the runs included, is as in any answer.
* constraint: time to compile a JSON schema, and for each token what finding the tokens that may come next adds.
* prompt cache: a prompt that is run, and the same from a file.
* context shift: the time of one, and how many tokens come between two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from fbiedge.cached_session import CachedSession
from fbiedge.cli_support import bundled_model
from fbiedge.constraint import compile_constraint
from fbiedge.engines import open_session
from fbiedge.generate import Engine, GenerationOptions, GenerationStats, generate
from fbiedge.prompt_cache import PromptCache
from fbiedge.sample_text import CALIBRATION_TEXT
from fbiedge.sampling import SamplingOptions
from fbiedge.tokenizer import Tokenizer

DRAFTS = (4, 8, 16)
REPETITIONS = 3
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "friends": {"type": "array", "items": {"type": "string"}},
        "age": {"type": "integer"},
    },
    "required": ["name", "friends", "age"],
}


@dataclass
class Copying:
    """An engine that says its prompt once more."""

    session: CachedSession
    ids: Sequence[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def forward(self, ids: Sequence[int], *, copy: bool = True) -> np.ndarray:
        return self._raised(self.session.forward(ids)[None])[0]

    def all_logits(self, ids: Sequence[int]) -> np.ndarray:
        return self._raised(self.session.all_logits(ids))

    def _raised(self, logits: np.ndarray) -> np.ndarray:
        for row, position in zip(reversed(logits), range(self.session.position, 0, -1), strict=False):
            row[self.ids[position % len(self.ids)]] += 1000
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", help="default: the bundled model")
    session = open_session(parser.parse_args().model or bundled_model())
    tokenizer = Tokenizer.from_model(session.model)
    text = tokenizer.encode(CALIBRATION_TEXT)[:100]
    report = {
        "model": session.model.path.name,
        "engine": session.description,
        "threads": session.threads,
        "lookup": lookup(session, tokenizer, text),
        "constraint": constraint(session, tokenizer, text),
        "prompt_cache": prompt_cache(session, tokenizer),
        "context_shift": context_shift(session, tokenizer),
    }
    print(json.dumps(report))


def lookup(session: CachedSession, tokenizer: Tokenizer, text: Sequence[int]) -> dict[str, Any]:
    greedy = GenerationOptions(sampling=SamplingOptions(temperature=0), max_tokens=len(text))
    kinds: dict[str, tuple[Engine, GenerationOptions]] = {
        "copy": (Copying(session, text), greedy),
        "greedy": (session, greedy),
        "sampled": (session, replace(greedy, sampling=SamplingOptions(temperature=0.8, seed=1))),
    }
    found: dict[str, Any] = {}
    for name, (engine, options) in kinds.items():
        prompt = text if name == "copy" else text[:8]
        choices = {drafts: replace(options, lookup_tokens=drafts) for drafts in (0, *DRAFTS)}
        generation = partial(decode, session, engine, tokenizer, prompt)
        speeds = alternately({drafts: partial(speed, generation, chosen) for drafts, chosen in choices.items()})
        stats = generation(choices[DRAFTS[-1]])
        found[name] = {"tokens_per_second": speeds, "drafted": stats.drafted_tokens, "accepted": stats.accepted_tokens}
        gains = ", ".join(f"{drafts}: {speeds[drafts] / speeds[0]:.2f}x" for drafts in DRAFTS)
        print(f"lookup, {name}: {speeds[0]:.0f} tok/s without, drafts of {gains}")
    return found


def constraint(session: CachedSession, tokenizer: Tokenizer, text: Sequence[int]) -> dict[str, Any]:
    compiling = median(lambda: timed(lambda: compile_constraint(tokenizer, session.vocab_size, json_schema=PERSON)))
    compiled = compile_constraint(tokenizer, session.vocab_size, json_schema=PERSON)
    free = GenerationOptions(sampling=SamplingOptions(seed=1), max_tokens=100)
    generation = partial(decode, session, session, tokenizer, text[:8])
    choices = {"free": free, "json": replace(free, constraint=compiled)}
    seconds = {
        name: 1 / value
        for name, value in alternately({n: partial(speed, generation, chosen) for n, chosen in choices.items()}).items()
    }
    print(
        f"constraint: compiled in {compiling * 1e3:.1f} ms, a token takes {seconds['json'] * 1e6:.0f} us "
        f"instead of {seconds['free'] * 1e6:.0f}"
    )
    return {"compile_seconds": compiling, "seconds_per_token": seconds}


def prompt_cache(session: CachedSession, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = (tokenizer.encode(CALIBRATION_TEXT) * 10)[: session.capacity * 3 // 4]
    options = GenerationOptions(sampling=SamplingOptions(temperature=0), max_tokens=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.cache"
        session.truncate(0)
        cache = PromptCache(path, session)
        list(cache.keep(generate(session, tokenizer, ids, options, ends=frozenset())))
        running, loading = [], []
        for _ in range(REPETITIONS):
            session.truncate(0)
            running.append(timed(lambda: list(generate(session, tokenizer, ids, options, ends=frozenset()))))
            session.truncate(0)
            loading.append(timed(lambda: PromptCache(path, session)))
        size = path.stat().st_size
    run, load = statistics.median(running), statistics.median(loading)
    print(f"prompt cache: {len(ids)} tokens run in {run * 1e3:.1f} ms, loaded in {load * 1e3:.1f} ms ({size} bytes)")
    return {"tokens": len(ids), "run_seconds": run, "load_seconds": load, "bytes": size}


def context_shift(session: CachedSession, tokenizer: Tokenizer) -> dict[str, Any]:
    """From a full context to the next token."""
    ids = (tokenizer.encode(CALIBRATION_TEXT) * 100)[: session.capacity]
    options = GenerationOptions(sampling=SamplingOptions(seed=1), max_tokens=2, context_shift=True)

    def shift() -> float:
        *_, stats = generate(session, tokenizer, ids, options, ends=frozenset())
        assert isinstance(stats, GenerationStats) and stats.shifted_tokens
        return stats.decode_seconds

    seconds = median(shift)
    again = session.position
    print(
        f"context shift: {seconds * 1e3:.1f} ms for {again} tokens that are run again, each {session.capacity - again} tokens"
    )
    return {"seconds": seconds, "tokens_run_again": again, "tokens_between": session.capacity - again}


def decode(
    session: CachedSession, engine: Engine, tokenizer: Tokenizer, prompt: Sequence[int], options: GenerationOptions
) -> GenerationStats:
    """A generation from an empty cache that no token ends."""
    session.truncate(0)
    *_, stats = generate(engine, tokenizer, prompt, options, ends=frozenset())
    assert isinstance(stats, GenerationStats)
    return stats


def speed(generation: Callable[[GenerationOptions], GenerationStats], options: GenerationOptions) -> float:
    return generation(options).decode_tokens_per_second


def alternately(measures: dict[Any, Callable[[], float]]) -> dict[Any, float]:
    """The median of each, measured in turn, so that what slows the machine for a while slows all of them."""
    found: dict[Any, list[float]] = {name: [] for name in measures}
    for repetition in range(REPETITIONS + 1):
        for name, measure in measures.items():
            value = measure()
            if repetition:  # the first warms up
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def median(measure: Callable[[], float]) -> float:
    return alternately({"it": measure})["it"]


def timed(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


if __name__ == "__main__":
    main()
