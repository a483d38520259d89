"""What the scheduler does where the engine fails, with engines that fail on purpose."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from support.bundled import MODEL

from fbiedge.engines import open_session
from fbiedge.generate import GenerationOptions
from fbiedge.serve.api_error import ApiError
from fbiedge.serve.scheduler import Finished, Job, Scheduler, Ticket
from fbiedge.tokenizer import Tokenizer


def asked(count: int = 1) -> Ticket:
    job = Job(prompt_ids=[1, 300], options=GenerationOptions(max_tokens=5))
    return Ticket([job] * count, time.monotonic() + 60)


async def answer(ticket: Ticket) -> list[Any]:
    return [event async for events in ticket.events() for _, event in events]


def scheduler(session: Any) -> Scheduler:
    return Scheduler([session], Tokenizer.from_model(session.model), frozenset({2}), queue=8)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError()])
def test_an_answer_that_fails_is_told_and_the_next_is_answered(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    session = open_session(MODEL)
    forward, failures = session.forward, [error]

    def failing(ids: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return forward(ids, **options)

    monkeypatch.setattr(session, "forward", failing)

    async def run() -> None:
        engine = scheduler(session)
        engine.start()
        first, second = asked(), asked()
        engine.submit(first)
        with pytest.raises(ApiError, match=f"the engine failed: {type(error).__name__}") as raised:
            await asyncio.wait_for(answer(first), 20)
        assert raised.value.status == 500 and engine.alive
        engine.submit(second)
        assert isinstance((await asyncio.wait_for(answer(second), 20))[-1], Finished)
        engine.close(0)
        engine.join(5)

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_the_engine_ends_everybody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those under way, those that wait, and those that come later."""
    session = open_session(MODEL)

    def ending(ids: Any, **options: Any) -> Any:
        raise SystemExit

    monkeypatch.setattr(session, "forward", ending)

    async def run() -> None:
        engine = scheduler(session)
        tickets = [asked(), asked(3)]
        for ticket in tickets:
            engine._waiting.extend((ticket, index) for index in range(len(ticket.jobs)))
        engine.start()
        for ticket in tickets:
            with pytest.raises(ApiError, match="the engine failed"):
                await asyncio.wait_for(answer(ticket), 20)
        engine.join(5)
        assert not engine.alive and engine.waiting == 0
        with pytest.raises(ApiError) as raised:
            engine.submit(asked())
        assert raised.value.status == 503

    asyncio.run(run())
