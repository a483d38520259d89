"""Who is answered when. One thread runs the model; it takes a step of every answer in turn, so that all of them flow.

    submit() -> queue -> a free slot -> one next() of generate() a round -> events, back in the event loop

A slot is a session with a KV cache of its own; all share the weights. An answer takes the free slot that remembers most
of its prompt, and what the slot remembers beyond that is forgotten: only tokens that the new prompt begins with, too, are
ever reused, so nothing of one client reaches another but the time that was saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cached_session import CachedSession
from ..errors import FbiEdgeError, UsageError
from ..generate import GenerationOptions, GenerationStats, Piece, generate
from ..tokenizer import Tokenizer
from .api_error import ApiError

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 0.005  # events wait at most so long for others to cross over to the event loop with them


@dataclass(frozen=True, kw_only=True)
class Job:
    """One answer to generate."""

    prompt_ids: list[int] = field(repr=False)
    options: GenerationOptions
    reuse: bool = True  # what a slot remembers of the prompt


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of an answer. `timed_out`: it was cut short by its deadline."""

    stats: GenerationStats
    timed_out: bool


Event = Piece | Finished


class Ticket:
    """The answers to one request, as they come; for the event loop."""

    def __init__(self, jobs: Sequence[Job], deadline: float) -> None:
        self.jobs = jobs
        self.deadline = deadline  # of time.monotonic()
        self.submitted = time.monotonic()
        self.first_token: float | None = None  # when the first one was there
        self.cancelled = False  # read by the engine's thread
        self._unfinished = len(jobs)
        self._events: list[tuple[int, Event]] = []
        self._error: ApiError | None = None
        self._arrived = asyncio.Event()

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """All that has come since the last look, by the job's number; ends when every job has. Raises ApiError."""
        while self._unfinished or self._events:
            await self._arrived.wait()
            self._arrived.clear()
            if self._error is not None:
                raise self._error
            events, self._events = self._events, []
            self._unfinished -= sum(isinstance(event, Finished) for _, event in events)
            if events:
                yield events

    def cancel(self) -> None:
        """Nobody wants the rest."""
        self.cancelled = True

    def deliver(self, index: int, event: Event | ApiError) -> None:
        """In the event loop's thread."""
        if isinstance(event, ApiError):
            self._error = self._error or event
        elif not self.cancelled:
            self._events.append((index, event))
        self._arrived.set()


@dataclass
class _Slot:
    session: CachedSession
    last_used: float = 0.0
    ticket: Ticket | None = None
    index: int = 0
    events: Iterator[Any] | None = None


class Scheduler:
    """Slots, a queue before them, and the thread that runs the model."""

    def __init__(
        self, sessions: Sequence[CachedSession], tokenizer: Tokenizer, ends: frozenset[int], *, queue: int
    ) -> None:
        self._slots = [_Slot(session) for session in sessions]
        self._tokenizer, self._ends = tokenizer, ends
        self._queue_limit = queue
        self._waiting: deque[tuple[Ticket, int]] = deque()
        self._changed = threading.Condition()  # guards `_waiting`, `_close_at`
        self._close_at: float | None = None  # when the answers under way must end, as the server does
        self._outbox: list[tuple[Ticket, int, Event | ApiError]] = []
        self._flushed = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """In the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether answers can still be generated."""
        return self._thread.is_alive() and self._close_at is None

    @property
    def running(self) -> int:
        """Slots in use."""
        return sum(slot.ticket is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        """Answers in the queue."""
        return len(self._waiting)

    @property
    def slots(self) -> int:
        """How many answers are generated at a time."""
        return len(self._slots)

    def check_room(self, answers: int) -> None:
        """Raises ApiError where so many more can't be taken, now or ever."""
        if answers > self._queue_limit + self.slots:
            raise ApiError(
                400,
                f"the request asks for {answers} answers, this server takes at most {self._queue_limit + self.slots}",
            )
        if self._close_at is not None or not self._thread.is_alive():
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self.waiting + answers > self._queue_limit + max(0, self.slots - self.running):
            raise ApiError(
                429, f"the queue of {self._queue_limit} answers is full; try again", code="queue_full", retry_after=1
            )

    def submit(self, ticket: Ticket) -> None:
        """Queue its jobs. Raises ApiError."""
        with self._changed:
            self.check_room(len(ticket.jobs))
            self._waiting.extend((ticket, index) for index in range(len(ticket.jobs)))
            self._changed.notify()

    def close(self, grace: float) -> None:
        """Take no more; end what waits now, and what is under way after `grace` seconds."""
        with self._changed:
            if self._close_at is None:
                self._close_at = time.monotonic() + grace
            self._changed.notify()

    def join(self, timeout: float) -> None:
        """Wait for the thread's end."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            logger.exception("the engine ended")
            raise
        finally:  # without it nobody would ever be told
            with self._changed:
                self._close_at = self._close_at or time.monotonic()
                under_way = [(slot.ticket, slot.index) for slot in self._slots if slot.ticket is not None]
                for ticket, index in [*under_way, *self._waiting]:
                    self._post(ticket, index, ApiError(500, "the engine failed"))
                self._waiting.clear()
            self._flush()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self.running or self._close_at is not None):
                    self._changed.wait()
                self._admit()
                if self._close_at is not None and not self.running:
                    self._flush()
                    return
            for slot in self._slots:
                if slot.ticket is not None:
                    self._step(slot, slot.ticket)
                    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                        self._flush()
            self._flush()

    def _admit(self) -> None:
        """Give free slots to those who wait longest."""
        for ticket, index in [one for one in self._waiting if self._close_at is not None or self._is_over(one[0])]:
            self._waiting.remove((ticket, index))
            self._post(ticket, index, self._late())
        while self._waiting and self.running < self.slots:
            ticket, index = self._waiting.popleft()
            job = ticket.jobs[index]
            free = [slot for slot in self._slots if slot.ticket is None]
            slot = max(free, key=lambda slot: (_remembered(slot, job), -slot.last_used))
            if not job.reuse:
                slot.session.truncate(0)
            slot.ticket, slot.index = ticket, index
            slot.events = generate(
                slot.session, self._tokenizer, job.prompt_ids, job.options, ends=self._ends,
                cancelled=lambda ticket=ticket: self._is_over(ticket),  # type: ignore[misc]
            )  # fmt: skip

    def _step(self, slot: _Slot, ticket: Ticket) -> None:
        """One run of the model at most."""
        assert slot.events is not None
        try:
            event = next(slot.events)
        except FbiEdgeError as error:
            self._post(ticket, slot.index, ApiError(400 if isinstance(error, UsageError) else 500, str(error)))
        except Exception as error:  # a bug: this answer fails, the others go on
            logger.exception("the engine failed")
            self._post(ticket, slot.index, ApiError(500, f"the engine failed: {type(error).__name__}"))
            slot.session.truncate(0)
        else:
            if isinstance(event, Piece):
                if event.token_id is not None and ticket.first_token is None:
                    ticket.first_token = time.monotonic()
                self._post(ticket, slot.index, event)
            if not isinstance(event, GenerationStats):
                return
            cut = event.finish_reason == "cancelled"
            if cut and (self._close_at is not None or not event.generated_ids):
                self._post(ticket, slot.index, self._late())
            else:
                self._post(ticket, slot.index, Finished(stats=event, timed_out=cut))
        slot.ticket = slot.events = None
        slot.last_used = time.monotonic()

    def _is_over(self, ticket: Ticket) -> bool:
        now = time.monotonic()
        return ticket.cancelled or now > ticket.deadline or (self._close_at is not None and now > self._close_at)

    def _late(self) -> ApiError:
        if self._close_at is not None:
            return ApiError(503, "the server is shutting down", code="shutting_down")
        return ApiError(503, "the request took longer than this server allows", code="timeout", retry_after=1)

    def _post(self, ticket: Ticket, index: int, event: Event | ApiError) -> None:
        self._outbox.append((ticket, index, event))

    def _flush(self) -> None:
        """Hand events over to the event loop, many at a time: waking it costs as much as a step of a small model."""
        self._flushed = time.monotonic()
        if self._outbox:
            assert self._loop is not None
            events, self._outbox = self._outbox, []
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(_deliver, events)


def _remembered(slot: _Slot, job: Job) -> int:
    """Tokens of the prompt that the slot needn't run again. None where more of what it remembers would be forgotten for
    them: the slot that was unused for longest is the better choice then."""
    shared = slot.session.shared(job.prompt_ids) if job.reuse else 0
    return shared if 2 * shared >= slot.session.position else 0


def _deliver(events: list[tuple[Ticket, int, Event | ApiError]]) -> None:
    for ticket, index, event in events:
        ticket.deliver(index, event)
