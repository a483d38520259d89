"""When the context is full: what is forgotten, what stays, and that what stays is as if nothing else had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.bundled import MODEL, PROMPT
from support.tiny_model import CHAT_TEMPLATE, tiny_model

from fbiedge.cached_session import CachedSession
from fbiedge.chat import Chat
from fbiedge.engines import open_session
from fbiedge.errors import UsageError
from fbiedge.generate import GenerationOptions, GenerationStats, PromptProgress, generate
from fbiedge.sampling import SamplingOptions
from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer

GREEDY = SamplingOptions(temperature=0)


def run(session: CachedSession, ids: list[int], **options: Any) -> tuple[list[PromptProgress], GenerationStats]:
    tokenizer = Tokenizer.from_model(session.model)
    settings = GenerationOptions(**({"sampling": GREEDY, "context_shift": True} | options))
    *events, stats = generate(session, tokenizer, ids, settings, ends=frozenset())
    assert isinstance(stats, GenerationStats)
    return [event for event in events if isinstance(event, PromptProgress)], stats


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_after_a_shift_the_text_goes_on_as_from_what_is_left(keep: int) -> None:
    session = Session.open(MODEL, context=48)
    prompt = Tokenizer.from_model(session.model).encode(PROMPT)
    _, stats = run(session, prompt, max_tokens=60, keep_tokens=keep)
    left = 48 - len(prompt)  # tokens that are run before the context is full
    sequence = [*prompt, *stats.generated_ids]
    full = len(prompt) + left + 1  # with the token that has no place
    window = [*sequence[:keep], *sequence[full - (48 - keep + 1) // 2 : full]]
    assert stats.shifted_tokens == 49 - len(window)
    rest = stats.generated_ids[left + 1 :]
    _, fresh = run(Session.open(MODEL), window, max_tokens=len(rest))
    assert fresh.generated_ids == rest


def test_many_shifts() -> None:
    session = Session.open(MODEL, context=20)
    progress, stats = run(session, [5, 6, 7], max_tokens=200)
    assert stats.generated_tokens == 200 and stats.finish_reason == "length"
    assert stats.shifted_tokens == 3 + 199 - session.position
    assert session.tokens[0] == 5 and session.tokens[1:] == stats.generated_ids[199 - session.position + 1 : 199]
    assert all(event.done == event.total <= 20 for event in progress)


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts(context: int) -> None:
    _, stats = run(Session.open(MODEL, context=context), [5], max_tokens=10, keep_tokens=1000)
    assert stats.generated_tokens == 10


def test_a_text_without_end_ends() -> None:
    """Without a limit, where the answer alone fills the context."""
    _, stats = run(Session.open(MODEL, context=30), [5, 6, 7])
    assert stats.generated_tokens == 30 and stats.finish_reason == "context"


def test_a_shift_says_how_far_it_is_and_can_be_cancelled() -> None:
    """In parts of at most 128 tokens, so that others get their turn."""
    session = Session.open(MODEL)
    tokenizer = Tokenizer.from_model(session.model)
    progress: list[PromptProgress] = []
    settings = GenerationOptions(sampling=GREEDY, context_shift=True, max_tokens=600)
    for event in generate(
        session, tokenizer, list(range(3, 503)), settings, ends=frozenset(), cancelled=lambda: len(progress) == 5
    ):
        if isinstance(event, PromptProgress):
            progress.append(event)
    assert [(event.done, event.total) for event in progress] == [
        (128, 500), (256, 500), (384, 500), (500, 500), (129, 257)]  # fmt: skip
    assert isinstance(event, GenerationStats) and event.finish_reason == "cancelled"
    assert session.position == 129


def test_a_prompt_that_does_not_fit_is_still_an_error() -> None:
    with pytest.raises(UsageError, match="prompt of 21 tokens is longer than the context of 20"):
        run(Session.open(MODEL, context=20), [5] * 21)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("chat"), chat_template=CHAT_TEMPLATE, max_position_embeddings=512)


def open_chat(path: Path, context: int, *, system: str | None = "Be kind.", **options: Any) -> Chat:
    settings = GenerationOptions(**({"max_tokens": 10, "sampling": GREEDY, "context_shift": True} | options))
    chat = Chat(open_session(path, context=context), settings, system=system)
    chat._ends = frozenset()
    return chat


def ask(chat: Chat, text: str) -> GenerationStats:
    *_, stats = chat.ask(text)
    assert isinstance(stats, GenerationStats)
    return stats


def test_the_oldest_turns_go_first(chat_model: Path) -> None:
    chat = open_chat(chat_model, 200)
    asked = [f"Question {number}" for number in range(12)]
    forgotten, run_again = 0, 0
    for number, text in enumerate(asked):
        stats = ask(chat, text)
        forgotten += chat.forgotten_turns
        run_again += chat.forgotten_turns > 0
        shown = chat.tokenizer.decode(chat.session.tokens)
        assert shown.startswith(f"[system]Be kind.[user]{asked[forgotten]}[assistant]"), "whole turns are forgotten"
        assert shown.count("[user]") == number + 1 - forgotten
        assert stats.shifted_tokens == 0 and stats.generated_tokens == 10, "and in time for the answer"
    assert forgotten > 5
    assert run_again <= 3, "several at a time, so that the cache serves the turns between"


def test_a_turn_longer_than_the_context_leaves_no_trace(chat_model: Path) -> None:
    chat = open_chat(chat_model, 120)
    ask(chat, "Hello")
    with pytest.raises(UsageError, match="no longer fits the context of 120"):
        ask(chat, "x" * 200)
    assert ask(chat, "again").cached_tokens > 40 and chat.forgotten_turns == 0


def test_a_long_turn_takes_the_place_of_all_others(chat_model: Path) -> None:
    chat = open_chat(chat_model, 120)
    for _ in range(2):
        ask(chat, "Hi")
    ask(chat, "x" * 70)
    assert chat.forgotten_turns == 2
    ask(chat, "y")
    assert chat.tokenizer.decode(chat.session.tokens).startswith("[system]Be kind.[user]y")


def test_an_answer_longer_than_the_context_keeps_the_system_prompt(chat_model: Path) -> None:
    chat = open_chat(chat_model, 100, max_tokens=150)
    stats = ask(chat, "Hello")
    assert stats.generated_tokens == 150 and stats.shifted_tokens > 50
    assert chat.tokenizer.decode(chat.session.tokens).startswith("[system]Be kind.[user]")
    assert "Hello" not in chat.tokenizer.decode(chat.session.tokens)
    ask(chat, "again")  # the answer doesn't fit any more, so its turn goes
    assert chat.forgotten_turns == 1
    chat.reset()
    ask(chat, "Hello")
    assert chat.forgotten_turns == 0


def test_without_a_template_the_newer_half_stays() -> None:
    chat = Chat(Session.open(MODEL, context=100), GenerationOptions(max_tokens=20, sampling=GREEDY, context_shift=True))
    chat.template, chat._ends = None, frozenset()
    for number in range(12):
        stats = ask(chat, f"number {number}")
        assert stats.generated_tokens == 20
    assert "number 11" in chat.tokenizer.decode(chat.session.tokens)
    with pytest.raises(UsageError, match="no longer fits"):
        ask(chat, "word " * 200)


def test_off_unless_asked_for(chat_model: Path) -> None:
    chat = open_chat(chat_model, 60, context_shift=False)
    ask(chat, "Hello")
    with pytest.raises(UsageError, match="no longer fits"):
        ask(chat, "Hello")
