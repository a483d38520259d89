"""Generation with an engine that says what it is told to: stop strings, ends, limits, and what the stats count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fbiedge.errors import UsageError
from fbiedge.generate import (
    Event,
    GenerationOptions,
    GenerationStats,
    Piece,
    end_tokens,
    generate,
)
from fbiedge.initialize import byte_tokenizer
from fbiedge.model_file import ModelFile
from fbiedge.reference import Reference
from fbiedge.sampling import SamplingOptions
from fbiedge.session import Session
from fbiedge.stop_strings import StopMatcher
from fbiedge.tokenizer import Tokenizer
from fbiedge.weights import open_checkpoint

GREEDY = SamplingOptions(temperature=0)
TOKENIZER = Tokenizer(byte_tokenizer(), {"bos_token": "<s>", "eos_token": "</s>"})
END = 2


class Script:
    """An engine whose most likely next token spells `text` after a prompt, then the end of text."""

    def __init__(self, text: str, prompt: Sequence[int], capacity: int = 1000) -> None:
        self.tokens: list[int] = []
        self.text = [*prompt, *TOKENIZER.encode_rendered(text), END]
        self.capacity = capacity
        self.vocab_size = 259
        self.runs: list[int] = []

    @property
    def position(self) -> int:
        return len(self.tokens)

    def reuse(self, ids: Sequence[int]) -> int:
        return 0

    def truncate(self, length: int) -> None:
        del self.tokens[length:]

    def forward(self, ids: Sequence[int]) -> np.ndarray:
        return self.all_logits(ids)[-1]

    def all_logits(self, ids: Sequence[int]) -> np.ndarray:
        start = self.position
        self.tokens.extend(ids)
        self.runs.append(len(ids))
        assert self.position <= self.capacity
        return np.eye(259, dtype=np.float32)[self.text[start + 1 : self.position + 1]]


def run(
    text: str, *, capacity: int = 1000, cancel_after: int | None = None, **options: object
) -> tuple[str, GenerationStats]:
    """The text that comes out, and the stats."""
    prompt = TOKENIZER.encode("prompt")
    pieces: list[str] = []
    events: Iterator[Event] = generate(
        Script(text, prompt, capacity),
        TOKENIZER,
        prompt,
        GenerationOptions(sampling=GREEDY, **options),  # type: ignore[arg-type]
        ends=frozenset({END}),
        cancelled=lambda: cancel_after is not None and len(pieces) >= cancel_after,
    )
    for event in events:
        if isinstance(event, GenerationStats):
            assert next(events, None) is None, "the stats come last"
            return "".join(pieces), event
        if isinstance(event, Piece):
            pieces.append(event.text)
    raise AssertionError("no stats")


def test_ends_where_the_model_does() -> None:
    text, stats = run("Hello, 世界 😀!")
    assert text == "Hello, 世界 😀!"
    assert stats.finish_reason == "end" and stats.ended_by == END
    assert stats.generated_ids == tuple(TOKENIZER.encode_rendered("Hello, 世界 😀!"))
    assert (stats.prompt_tokens, stats.cached_tokens) == (7, 0)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_max_tokens(limit: int) -> None:
    text, stats = run("abcdef", max_tokens=limit)
    assert text == "abcdef"[:limit]
    assert (stats.finish_reason, stats.generated_tokens) == ("length", limit)


def test_a_limit_within_a_character_replaces_it() -> None:
    assert run("a😀", max_tokens=3)[0] == "a\ufffd"


def test_the_last_token_of_the_context_is_used() -> None:
    text, stats = run("abcdef", capacity=10)  # 7 of prompt, 3 more to run, and one from the last logits
    assert (text, stats.finish_reason) == ("abcd", "context")


def test_a_prompt_that_just_fits_and_one_that_does_not() -> None:
    assert run("abc", capacity=7)[0] == "a"
    with pytest.raises(UsageError, match="prompt of 7 tokens is longer than the context of 6"):
        run("abc", capacity=6)


def test_cancelling() -> None:
    text, stats = run("abcdef", cancel_after=2)
    assert (text, stats.finish_reason) == ("ab", "cancelled")


def test_cancelling_before_anything() -> None:
    text, stats = run("abcdef", cancel_after=0)
    assert (text, stats.finish_reason, stats.generated_tokens) == ("", "cancelled", 0)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Hello world", ("wor",), "Hello "),
        ("Hello world", ("world",), "Hello "),
        ("Hello world", ("H",), ""),
        ("aaab", ("aab",), "a"),
        ("one<|en<|end|>two", ("<|end|>",), "one<|en"),
        ("abcd", ("bc", "b"), "a"),
        ("abcd", ("cd", "bcd"), "a"),
        ("x\n\nUser: y", ("\nUser:", "###"), "x\n"),
        ("😀 stop 世界", ("世",), "😀 stop "),
        ("never", ("no such",), "never"),
        ("ends in a par", ("part",), "ends in a par"),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str) -> None:
    got, stats = run(text, stop=stop)
    assert got == expected
    assert stats.finish_reason == ("stop" if any(s in text for s in stop) else "end")


def test_a_stop_string_across_the_end_of_a_cancelled_text_is_not_lost() -> None:
    assert run("abcdef", stop=("cdX",), max_tokens=4)[0] == "abcd"


@pytest.mark.parametrize("seed", range(200))
def test_stop_matcher_against_its_definition(seed: int) -> None:
    """Whatever the pieces: out comes the text before the first stop string, and none of it later than certain."""
    generator = np.random.default_rng(seed)
    text = "".join(generator.choice(list("ab"), 30))
    stops = ["".join(generator.choice(list("ab"), generator.integers(2, 7))) for _ in range(generator.integers(0, 3))]
    cuts = [0, *sorted(generator.integers(0, 30, 8).tolist()), 30]
    matcher, out = StopMatcher(stops), ""
    for start, end in pairwise(cuts):
        out += matcher.push(text[start:end])
        seen = text[:end]
        first = min((seen.find(stop) for stop in stops if stop in seen), default=None)
        if first is None:
            # Held back is exactly the longest end of the text that may still become a stop string.
            held = max((size for stop in stops for size in range(len(stop)) if seen.endswith(stop[:size])), default=0)
            assert out == seen[: len(seen) - held]
        else:
            assert matcher.stopped and out == seen[:first]
            return
    assert out + matcher.flush() == text


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"max_tokens": -3}, {"stop": ("a", "")}])
def test_options_that_can_not_be(options: dict) -> None:
    with pytest.raises(UsageError):
        GenerationOptions(**options)


def test_rates() -> None:
    stats = GenerationStats(
        prompt_tokens=12, cached_tokens=2, generated_ids=(5, 5, 5), prefill_seconds=2.0, decode_seconds=0.5,
        finish_reason="length",
    )  # fmt: skip
    assert stats.prefill_tokens_per_second == 5
    assert stats.decode_tokens_per_second == 4  # two steps: the first token came with the prefill
    assert dataclasses.replace(stats, ended_by=2).decode_tokens_per_second == 6
    assert dataclasses.replace(stats, prefill_seconds=0.0, generated_ids=()).prefill_tokens_per_second == 0


def test_greedy_generation_is_the_references(plain_model: Path, engine: str) -> None:
    session = Session.open(plain_model)
    tokenizer = Tokenizer.from_model(session.model)
    prompt = tokenizer.encode("Once upon")
    expected = Reference(open_checkpoint(plain_model.parent / "checkpoint")).greedy(prompt, 20)
    options = GenerationOptions(max_tokens=20, sampling=GREEDY)
    for _ in range(2):  # the second time with the prompt in the cache
        *_, stats = generate(session, tokenizer, prompt, options, ends=frozenset())
        assert isinstance(stats, GenerationStats)
        assert list(stats.generated_ids) == list(expected)
    assert stats.cached_tokens == len(prompt) - 1


def test_end_tokens_come_from_every_file(tmp_path: Path) -> None:
    from support.tiny_model import tiny_model

    model = ModelFile.open(tiny_model(tmp_path, generation_config={"eos_token_id": [7, 9]}, eos_token_id=5))
    assert end_tokens(model, Tokenizer.from_model(model)) == {2, 5, 7, 9}
