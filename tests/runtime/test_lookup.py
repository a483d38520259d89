"""Drafts from what was said before: where they come from, and that they never change a text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundled import MODEL, PROMPT, UNSEEN_STORY
from support.tiny_model import tiny_model

from fbiedge import ops_library
from fbiedge.cached_session import CachedSession
from fbiedge.generate import GenerationOptions, GenerationStats, Piece, generate
from fbiedge.initialize import byte_tokenizer
from fbiedge.lookup import Decoder, Lookup
from fbiedge.sampling import SamplingOptions
from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer

GREEDY = SamplingOptions(temperature=0)


def lookup(tokens: str) -> Lookup:
    found = Lookup()
    for token in tokens:
        found.append(ord(token))
    return found


@pytest.mark.parametrize(
    ("text", "most", "draft"),
    [
        ("", 4, ""),
        ("a", 4, ""),
        ("abcd", 4, ""),
        ("abXYab", 4, "XYab"),
        ("abXYab", 2, "XY"),
        ("abX abY ab", 2, "Y "),
        ("cabX-abY-cab", 1, "X"),  # longer beats newer
        ("abX abY-ab", 1, "Y"),  # newer beats older among equals
        ("aaaa", 3, "a"),  # no more than there is
        ("Xb-Yb", 4, ""),  # one token alone is no match
    ],
)
def test_drafts(text: str, most: int, draft: str) -> None:
    assert "".join(map(chr, lookup(text).draft(most))) == draft


@pytest.mark.parametrize("seed", range(50))
def test_a_draft_follows_the_longest_match(seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 3, 40).tolist()
    found = Lookup()
    for token in tokens:
        found.append(token)
    sizes = {
        end: max(n for n in range(17) if n <= end and tokens[end - n : end] == tokens[len(tokens) - n :])
        for end in range(len(tokens))
    }
    longest = max(sizes.values())
    end = max(end for end, size in sizes.items() if size == longest)
    assert found.draft(5) == (tokens[end : end + 5] if longest >= 2 else [])


@pytest.fixture(scope="module")
def bundled() -> Session:
    return Session.open(MODEL)


def run(
    session: CachedSession, prompt: str, options: dict[str, Any], ends: frozenset[int] = frozenset()
) -> tuple[list[Piece], GenerationStats, tuple[int, ...]]:
    """Pieces, stats, and the cache afterwards, from an empty cache."""
    session.truncate(0)
    tokenizer = Tokenizer.from_model(session.model)
    events = generate(session, tokenizer, tokenizer.encode(prompt), GenerationOptions(**options), ends=ends)
    pieces: list[Piece] = []
    for event in events:
        if isinstance(event, Piece):
            pieces.append(event)
        elif isinstance(event, GenerationStats):
            stats = event
    return pieces, stats, session.tokens


# What has the model say the same again and again, and what has it not.
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": GREEDY, "max_tokens": 150},
    "seed": {"sampling": SamplingOptions(seed=5), "max_tokens": 150},
    "hot": {"sampling": SamplingOptions(seed=1, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0), "max_tokens": 60},
    "penalty": {"sampling": SamplingOptions(seed=2, temperature=0.5, repetition_penalty=1.1), "max_tokens": 150},
    "bias": {"sampling": GREEDY, "logit_bias": {30: 3.5, 31: -100, 500: 2.0}, "max_tokens": 100},
    "logprobs": {"sampling": GREEDY, "logprobs": 3, "max_tokens": 80},
    "stop": {"sampling": GREEDY, "stop": ("big",), "max_tokens": 200},
    "context": {"sampling": GREEDY},
    "shift": {"sampling": GREEDY, "context_shift": True, "max_tokens": 700},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lookup_tokens", [1, 3, 16, 127])
def test_the_text_is_the_same(bundled: Session, name: str, lookup_tokens: int) -> None:
    options = CASES[name]
    pieces, plain, cache = run(bundled, PROMPT, options)
    with_drafts, stats, cache_after = run(bundled, PROMPT, {**options, "lookup_tokens": lookup_tokens})
    assert with_drafts == pieces
    assert stats.generated_ids == plain.generated_ids and stats.finish_reason == plain.finish_reason
    assert stats.shifted_tokens == plain.shifted_tokens
    assert cache_after == cache, "nothing that was only guessed stays in the cache"
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
    assert plain.drafted_tokens == 0
    if name in ("greedy", "context", "shift"):
        assert stats.accepted_tokens > 2, "the test is about drafts that come true"


def test_a_constrained_text_is_the_same(bundled: Session) -> None:
    from fbiedge.constraint import compile_constraint

    tokenizer = Tokenizer.from_model(bundled.model)
    constraint = compile_constraint(
        tokenizer, bundled.vocab_size, json_schema={"type": "array", "items": {"enum": ["big dog", "big cat"]}, "minItems": 9}
    )  # fmt: skip
    options = {"sampling": SamplingOptions(seed=3), "constraint": constraint, "max_tokens": 120}
    pieces, _, _ = run(bundled, PROMPT, options, ends=frozenset({2}))
    with_drafts, stats, _ = run(bundled, PROMPT, {**options, "lookup_tokens": 8}, ends=frozenset({2}))
    assert with_drafts == pieces and stats.accepted_tokens > 20


def test_copying_takes_few_runs(bundled: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything was said before, a run gives nearly as many tokens as may be guessed."""
    tokens = Tokenizer.from_model(bundled.model).encode(UNSEEN_STORY)
    runs: list[int] = []
    original = bundled._run
    monkeypatch.setattr(bundled, "_run", lambda ids, keep: runs.append(len(ids)) or original(ids, keep))
    bundled.truncate(0)
    bundled.forward(tokens)
    runs.clear()
    decoder = Decoder(bundled, tokens, 8)
    for token in tokens:
        decoder.step(token, most=1000)
    decoder.finish()
    assert bundled.tokens == (*tokens, *tokens)
    assert max(runs) == 9 and len(runs) < len(tokens) / 6


class Reciter:
    """An engine that says the same twenty tokens again and again, and knows how far it was run."""

    vocab_size = 40

    def __init__(self, capacity: int) -> None:
        self.capacity, self.position, self.furthest = capacity, 0, 0

    def reuse(self, ids: Sequence[int]) -> int:
        return 0

    def truncate(self, length: int) -> None:
        self.position = length

    def forward(self, ids: Sequence[int], *, copy: bool = True) -> np.ndarray:
        return self.all_logits(ids)[-1]

    def all_logits(self, ids: Sequence[int]) -> np.ndarray:
        said = [10 + at % 20 for at in range(self.position + 1, self.position + 1 + len(ids))]
        self.position += len(ids)
        self.furthest = max(self.furthest, self.position)
        return np.eye(self.vocab_size, dtype=np.float32)[said]


def recite(capacity: int, **options: Any) -> tuple[Reciter, GenerationStats]:
    """What follows 60 tokens, with drafts as long as they get."""
    engine, tokenizer = Reciter(capacity), Tokenizer(byte_tokenizer(), {})
    settings = GenerationOptions(sampling=GREEDY, lookup_tokens=127, **options)
    *_, stats = generate(engine, tokenizer, [10 + at % 20 for at in range(60)], settings, ends=frozenset())
    assert isinstance(stats, GenerationStats)
    assert list(stats.generated_ids) == [10 + at % 20 for at in range(60, 60 + stats.generated_tokens)]
    return engine, stats


@pytest.mark.parametrize("limit", range(1, 60))
def test_no_draft_goes_beyond_what_is_asked_for(limit: int) -> None:
    """The last token is never run, and what is guessed is all used."""
    engine, stats = recite(1000, max_tokens=limit)
    assert stats.generated_tokens == limit and stats.finish_reason == "length"
    assert engine.furthest == engine.position == 60 + limit - 1
    assert stats.drafted_tokens == stats.accepted_tokens and (limit < 3 or stats.drafted_tokens)


@pytest.mark.parametrize("capacity", range(60, 100))
def test_drafts_end_where_the_context_ends(capacity: int) -> None:
    engine, stats = recite(capacity)
    assert stats.generated_tokens == capacity - 60 + 1 and stats.finish_reason == "context"
    assert engine.furthest == engine.position == capacity


@pytest.mark.parametrize("lookup_tokens", [1, 16, 127])
def test_no_draft_goes_beyond_the_context(lookup_tokens: int) -> None:
    """In which every number of tokens may be left when a draft begins."""
    full = Session.open(MODEL, context=90)
    plain, drafted = ({"sampling": GREEDY, "lookup_tokens": tokens} for tokens in (0, lookup_tokens))
    for words in range(4, 16):
        prompt = PROMPT + " big" * words
        pieces, stats, cache = run(full, prompt, plain)
        with_drafts, after, cache_after = run(full, prompt, drafted)
        assert (with_drafts, cache_after) == (pieces, cache)
        assert stats.finish_reason == after.finish_reason == "context" and len(cache) == 90


def drafted_run(
    session: Session, options: dict[str, Any], stop_after: int | None = None
) -> tuple[GenerationStats, list[int]]:
    """A generation, cancelled after so many pieces, and the tokens that were guessed and open at each piece."""
    session.truncate(0)
    tokenizer = Tokenizer.from_model(session.model)
    ids = tokenizer.encode(PROMPT + " the big dog. the big dog. the big dog.")
    open_guesses: list[int] = []
    settings = GenerationOptions(**({"sampling": GREEDY, "lookup_tokens": 16, "max_tokens": 150} | options))
    *_, stats = (
        (isinstance(event, Piece) and open_guesses.append(session.position - len(ids) - len(open_guesses)), event)[1]
        for event in generate(
            session, tokenizer, ids, settings, ends=frozenset(), cancelled=lambda: len(open_guesses) == stop_after
        )
    )
    assert isinstance(stats, GenerationStats)
    assert session.tokens == (*ids, *stats.generated_ids)[: session.position], "only what was picked"
    assert session.position == len(ids) + stats.generated_tokens - (stats.finish_reason != "cancelled")
    return stats, open_guesses


def test_cancelled_inside_a_draft(bundled: Session) -> None:
    whole, guesses = drafted_run(bundled, {})
    inside = [number for number, guessed in enumerate(guesses, 1) if guessed > 1]
    assert len(inside) > 3, "the test is about drafts that are not used up"
    for number in inside:
        stats, _ = drafted_run(bundled, {}, stop_after=number)
        assert stats.finish_reason == "cancelled"
        assert stats.generated_ids == whole.generated_ids[:number]


def test_a_stop_string_inside_a_draft(bundled: Session) -> None:
    """Every word of the text once as what ends it."""
    whole, _ = drafted_run(bundled, {})
    tokenizer = Tokenizer.from_model(bundled.model)
    text = tokenizer.decode(whole.generated_ids)
    inside = 0
    for stop in sorted(set(text.split())):
        stats, guesses = drafted_run(bundled, {"stop": (stop,)})
        assert stats.finish_reason == "stop"
        assert tokenizer.decode(stats.generated_ids).index(stop) == text.index(stop)
        inside += guesses[-1] > 1
    assert inside > 0


@pytest.fixture(params=["default", *ops_library.available_isas()])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param != "default":
        monkeypatch.setitem(os.environ, "FBIEDGE_ISA", request.param)
    yield request.param


def largest_difference(session: CachedSession) -> float:
    """Between logits of runs of several tokens and of runs of one, after 60 others."""
    ids = np.random.default_rng(1).integers(3, session.vocab_size, 77).tolist()
    session.truncate(0)
    session.forward(ids[:60])
    single = np.stack([session.forward([token]) for token in ids[60:]])
    differences = []
    for size in (2, 3, 9, 17):
        session.truncate(60)
        several = np.concatenate([session.all_logits(ids[at : at + size]) for at in range(60, len(ids), size)])
        differences.append(np.abs(single - several).max())
    return float(max(differences))


@pytest.mark.parametrize("level", ["int8", "fp32"])
def test_a_run_of_several_tokens_has_the_bits_of_runs_of_one(isa: str, level: str) -> None:
    """With an int8 KV cache, on every instruction set. What the promise of the same text rests on."""
    assert largest_difference(Session.open(MODEL, accuracy_level=level)) == 0


def test_and_elsewhere_it_differs_by_rounding(tmp_path: Path, engine: str) -> None:
    """With an fp32 KV cache, where ONNX Runtime's attention computes."""
    path = tiny_model(tmp_path, max_position_embeddings=300)
    assert largest_difference(Session.open(path)) < 1e-4
