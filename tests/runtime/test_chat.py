"""A conversation: what the model is shown, and that nothing of it is run twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_model import CHAT_TEMPLATE, tiny_model

from fbiedge.chat import Chat
from fbiedge.errors import UsageError
from fbiedge.generate import GenerationOptions, GenerationStats, Piece
from fbiedge.sampling import SamplingOptions
from fbiedge.session import Session


def open_chat(path: Path, *, context: int | None = None, system: str | None = None, **options: object) -> Chat:
    sampling = SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=11)
    settings = GenerationOptions(**({"max_tokens": 12, "sampling": sampling} | options))  # type: ignore[arg-type]
    chat = Chat(Session.open(path, context=context), settings, system=system)
    chat._ends = frozenset()  # random weights end a text anywhere; these tests are about texts of known length
    return chat


def ask(chat: Chat, text: str) -> tuple[str, GenerationStats]:
    *pieces, stats = chat.ask(text)
    assert isinstance(stats, GenerationStats)
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), stats


@pytest.fixture
def chat(chat_model: Path, engine: str) -> Chat:
    return open_chat(chat_model)


def test_a_second_turn_runs_only_what_is_new(chat: Chat) -> None:
    ask(chat, "Hello")
    before = chat.session.position
    _, stats = ask(chat, "And you?")
    # New are the last generated token, which was never run, and "</s>[user]And you?</s>[assistant]".
    new = 1 + 1 + len("[user]And you?") + 1 + len("[assistant]")
    assert stats.prompt_tokens - stats.cached_tokens == new
    assert stats.cached_tokens == before


def test_every_later_turn_too(chat: Chat) -> None:
    new = [stats.prompt_tokens - stats.cached_tokens for _, stats in (ask(chat, "abc") for _ in range(5))]
    assert len(set(new[1:])) == 1


def test_the_ids_are_those_that_were_generated(chat: Chat) -> None:
    """A model's own words, tokenized again, may split differently; random bytes that are no UTF-8 certainly do."""
    _, first = ask(chat, "Hello")
    ask(chat, "again")
    start = first.prompt_tokens
    assert chat.session.tokens[start : start + 12] == first.generated_ids


def test_what_the_model_sees_is_the_template(chat: Chat) -> None:
    answer, _ = ask(chat, "Hello")
    ask(chat, "again")
    expected = f"[user]Hello[assistant]{answer}[user]again[assistant]"
    assert chat.tokenizer.decode(chat.session.tokens).startswith(expected)


def test_reuse_gives_the_answer_of_a_fresh_session(chat: Chat, chat_model: Path) -> None:
    answers = [ask(chat, text)[0] for text in ("Hello", "again", "more")]
    fresh = open_chat(chat_model)
    assert [ask(fresh, text)[0] for text in ("Hello", "again")] == answers[:2]
    fresh.session.truncate(0)  # the third turn from an empty cache
    assert ask(fresh, "more")[0] == answers[2]


def test_reset_forgets(chat: Chat) -> None:
    ask(chat, "Hello")
    chat.reset()
    _, stats = ask(chat, "Hello")
    assert stats.prompt_tokens == 1 + len("[user]Hello") + 1 + len("[assistant]")


def test_a_stop_string_leaves_the_text_before_it(chat_model: Path) -> None:
    full, _ = ask(open_chat(chat_model), "Hello")
    stop = full[5:7]
    chat = open_chat(chat_model, stop=(stop,))
    answer, stats = ask(chat, "Hello")
    assert answer == full[: full.index(stop)] and stats.finish_reason == "stop"
    ask(chat, "again")
    rendered = chat.tokenizer.decode(chat.session.tokens)
    assert rendered.startswith(f"[user]Hello[assistant]{answer}[user]again[assistant]")


def test_a_cancelled_answer_stays_as_far_as_it_came(chat: Chat) -> None:
    seen: list[str] = []
    for event in chat.ask("Hello", lambda: len(seen) >= 3):
        if isinstance(event, Piece):
            seen.append(event.text)
        elif isinstance(event, GenerationStats):
            assert event.finish_reason == "cancelled"
    ask(chat, "again")
    expected = f"[user]Hello[assistant]{''.join(seen)}[user]again"
    assert chat.tokenizer.decode(chat.session.tokens).startswith(expected)


def test_a_turn_cancelled_before_its_answer_leaves_no_trace(chat: Chat) -> None:
    list(chat.ask("Hello", lambda: True))
    _, stats = ask(chat, "again")
    assert stats.prompt_tokens == 1 + len("[user]again") + 1 + len("[assistant]")


def test_a_full_context_is_said_and_survived(chat_model: Path, engine: str) -> None:
    chat = open_chat(chat_model, context=60)
    ask(chat, "Hello")
    with pytest.raises(UsageError, match=r"conversation of \d+ tokens no longer fits the context of 60; /reset"):
        ask(chat, "x" * 40)
    _, stats = ask(chat, "y")  # the long turn left nothing behind
    assert stats.prompt_tokens < 60
    chat.reset()
    assert ask(chat, "x" * 20)[1].cached_tokens < 10


def test_an_answer_ends_with_the_context(chat_model: Path) -> None:
    chat = open_chat(chat_model, context=40, max_tokens=None)
    assert ask(chat, "Hello")[1].finish_reason == "context"


def test_without_a_template_the_text_goes_on(plain_model: Path, engine: str) -> None:
    chat = open_chat(plain_model)
    assert chat.template is None
    answer, _ = ask(chat, "Once")
    _, stats = ask(chat, "then")
    assert chat.tokenizer.decode(chat.session.tokens).startswith(f"Once{answer}\nthen")
    assert stats.prompt_tokens - stats.cached_tokens == 1 + len("\nthen")


def test_system_prompt(chat_model: Path, plain_model: Path) -> None:
    chat = open_chat(chat_model, system="Be brief.")
    for _ in range(2):
        ask(chat, "Hello")
        assert chat.tokenizer.decode(chat.session.tokens).startswith("[system]Be brief.[user]Hello")
        chat.reset()
    with pytest.raises(UsageError, match="no chat template"):
        open_chat(plain_model, system="Be brief.")


@pytest.mark.parametrize(
    "change",
    [
        "{{ message.content | trim }}",
        "{{ message.content if not loop.first else message.content | upper }}",
        "{{ message.content[:3] }}",
        "{{ message.content | length }}",
        "{% if loop.last %}{{ message.content }}{% endif %}",
    ],
)
def test_a_template_that_rewrites_answers_is_obeyed(change: str, tmp_path: Path) -> None:
    """Then the generated ids are not what the template says, and the rendered text is tokenized instead."""
    template = CHAT_TEMPLATE.replace("{{ message.content }}", change)
    chat = open_chat(tiny_model(tmp_path, chat_template=template, max_position_embeddings=256))
    assert chat.template is not None
    answer, _ = ask(chat, "Hello")
    _, stats = ask(chat, "again")
    rendered = chat.template.render(
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "again"},
        ]
    )
    shown = chat.session.tokens[: stats.prompt_tokens]
    plain = rendered.replace("<s>", "").replace("</s>", "")
    assert chat.tokenizer.decode(shown) == plain
