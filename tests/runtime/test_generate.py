"""Generation with an engine that says what it is told to: stop strings, ends, limits, and what the stats count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.errors import raises_line

from fbiedge.errors import UsageError
from fbiedge.generate import (
    Event,
    GenerationOptions,
    GenerationStats,
    Piece,
    PromptProgress,
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

    def forward(self, ids: Sequence[int], *, copy: bool = True) -> np.ndarray:
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


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": -1}, "logprobs is -1, expected a whole number from 0 to 20"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": True}, "logprobs is True"),
        ({"logprobs": False}, "logprobs is False"),
        ({"lookup_tokens": 128}, "lookup_tokens is 128, expected a whole number from 0 to 127"),
        ({"lookup_tokens": 1.5}, "lookup_tokens is 1.5"),
        ({"keep_tokens": -1}, "keep_tokens is -1, expected a whole number of at least 0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names token -1, expected a token id"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias names token '5'"),
        ({"logit_bias": {True: 1.0}}, "logit_bias names token True"),
        ({"logit_bias": {5: NAN}}, "logit_bias of token 5 is nan, expected a number from -100 to 100"),
        ({"logit_bias": {5: float("-inf")}}, "logit_bias of token 5 is -inf"),
        ({"logit_bias": {5: 1e300}}, "logit_bias of token 5 is 1e+300"),
        ({"logit_bias": {5: "1"}}, "logit_bias of token 5 is '1'"),
        ({"logit_bias": {5: True}}, "logit_bias of token 5 is True"),
    ],
)
def test_generation_features_that_can_not_be(options: dict, message: str) -> None:
    with raises_line(UsageError, message):
        GenerationOptions(**options)


def test_a_biased_token_must_be_one_of_the_models() -> None:
    with raises_line(UsageError, "logit_bias names token 259, expected an id from 0 to 258"):
        run("abc", logit_bias={259: 1.0})


def events_of(text: str, **options: object) -> list[Event]:
    prompt = TOKENIZER.encode("prompt")
    settings = GenerationOptions(sampling=GREEDY, **options)  # type: ignore[arg-type]
    return list(generate(Script(text, prompt), TOKENIZER, prompt, settings, ends=frozenset({END})))


def test_a_piece_for_every_token() -> None:
    """Also in the middle of a character and of a stop string, where no text is certain yet."""
    *pieces, stats = [
        event for event in events_of("a😀<|en", stop=("<|end|>",)) if not isinstance(event, PromptProgress)
    ]
    assert isinstance(stats, GenerationStats)
    assert [piece.text for piece in pieces if isinstance(piece, Piece)] == [
        "a",
        "",
        "",
        "",
        "😀",
        "",
        "",
        "",
        "",
        "<|en",
    ]
    ids = [piece.token_id for piece in pieces if isinstance(piece, Piece)]
    assert ids == [*stats.generated_ids, None]


def test_the_token_that_stops_has_a_piece_too() -> None:
    pieces = [event for event in events_of("a stop", stop=("op",)) if isinstance(event, Piece)]
    assert [piece.text for piece in pieces] == ["a", " ", "s", "t", "", ""]


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
def test_progress_of_a_prompt(size: int) -> None:
    prompt = [5] * size
    engine = Script("abc", prompt)
    found = []
    for event in generate(engine, TOKENIZER, prompt, GenerationOptions(sampling=GREEDY), ends=frozenset({END})):
        if isinstance(event, PromptProgress):
            found.append((event.done, event.total, len(engine.runs)))
    assert found == [(min(128 * n, size), size, n) for n in range(1, -(-size // 128) + 1)]


def test_one_next_is_at_most_one_run_of_128_tokens(plain_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever drives several generations in turn is fair to them."""
    session = Session.open(plain_model, context=60)
    runs: list[int] = []
    original = session._run
    monkeypatch.setattr(session, "_run", lambda ids, keep: runs.append(len(ids)) or original(ids, keep))
    tokenizer = Tokenizer.from_model(session.model)
    options = GenerationOptions(sampling=GREEDY, lookup_tokens=127, context_shift=True, max_tokens=150)
    before = 0
    for _ in generate(session, tokenizer, tokenizer.encode("abc abc " * 5), options, ends=frozenset()):
        assert len(runs) <= before + 1
        before = len(runs)
    assert before > 10 and max(runs) <= 128


def test_logprobs_are_the_models_own(plain_model: Path) -> None:
    """Of the raw logits, as OpenAI's: bias, penalty and temperature change what is picked and not what is said of it."""
    session = Session.open(plain_model)
    tokenizer = Tokenizer.from_model(session.model)
    prompt = tokenizer.encode("Once")
    options = GenerationOptions(
        max_tokens=8, logprobs=3, logit_bias={70: 20.0},
        sampling=SamplingOptions(seed=1, temperature=0.7, repetition_penalty=1.3),
    )  # fmt: skip
    pieces = [event for event in generate(session, tokenizer, prompt, options, ends=frozenset())
              if isinstance(event, Piece) and event.token_id is not None]  # fmt: skip
    session.truncate(0)
    ids = [piece.token_id for piece in pieces if piece.token_id is not None]
    logits = session.all_logits([*prompt, *ids]).astype(np.float64)[len(prompt) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert 70 in ids
    for piece, row in zip(pieces, expected, strict=True):
        assert piece.logprob == pytest.approx(row[piece.token_id], abs=1e-5)
        best = np.argsort(-row, kind="stable")[:3]
        assert [token for token, _ in piece.top_logprobs] == best.tolist()
        assert [value for _, value in piece.top_logprobs] == pytest.approx(row[best], abs=1e-5)


@pytest.mark.parametrize(("logprobs", "has"), [(None, False), (0, True), (20, True)])
def test_how_many_logprobs(logprobs: int | None, has: bool) -> None:
    for event in events_of("abc", logprobs=logprobs):
        if isinstance(event, Piece):
            assert (event.logprob is not None) is has
            assert len(event.top_logprobs) == (logprobs or 0)


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
