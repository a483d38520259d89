"""The routes, and what happens between a question and its answer."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import protocol
from .answers import DONE, Answers, Chat, Text, server_sent
from .api_error import ApiError
from .guards import Guard, read_body
from .metrics import CONTENT_TYPE, Metrics
from .options import ServerOptions
from .scheduler import Finished, Scheduler, Ticket
from .service import Service

_CLIENT_LEFT = 499  # in the log and in the metrics, as nginx calls it

Result = TypeVar("Result")
Log = Callable[[str], None]


def build_app(service: Service, scheduler: Scheduler, options: ServerOptions, log: Log) -> Starlette:
    """The ASGI application; `log` gets a line for each request."""
    return _Api(service, scheduler, options, log).app


class _Api:
    def __init__(self, service: Service, scheduler: Scheduler, options: ServerOptions, log: Log) -> None:
        self._service, self._scheduler, self._options = service, scheduler, options
        self._metrics = Metrics(scheduler)
        # Templates and tokenizers; a schema that takes long to compile must not stand in their way.
        self._workers, self._compilers = ThreadPoolExecutor(2, "prompt"), ThreadPoolExecutor(1, "compile")
        cors = Middleware(
            CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        self.app = Starlette(
            routes=routes,
            middleware=[
                Middleware(RequestLog, log=log, metrics=self._metrics, paths=[route.path for route in routes]),
                *([cors] if options.cors_origins else []),
                Middleware(Guard, options=options),
            ],
            exception_handlers={ApiError: _explain, HTTPException: _explain_http, Exception: _explain_bug},
        )

    async def health(self, request: Request) -> Response:
        """Whether answers are to be had."""
        alive = self._scheduler.alive
        return JSONResponse({"status": "ok" if alive else "error"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        """By its name."""
        if request.path_params["name"] != self._service.name:
            raise ApiError(404, f"this server has {self._service.name!r}", code="model_not_found", param="model")
        return JSONResponse(self._described())

    async def chat(self, request: Request) -> Response:
        """The next turn of a conversation."""
        return await self._answer(request, protocol.ChatRequest, Chat)

    async def complete(self, request: Request) -> Response:
        """What follows a text."""
        return await self._answer(request, protocol.CompletionRequest, Text)

    def _described(self) -> dict[str, Any]:
        service = self._service
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "fbiedge"}

    async def _answer(self, request: Request, kind: type[protocol.Request], shape: type[Answers]) -> Response:
        deadline = time.monotonic() + self._options.request_timeout
        asked = protocol.parse(await read_body(request, self._options), kind)
        self._scheduler.check_room(1)  # before any work
        workers = self._workers if asked.constraint is None else self._compilers
        jobs = await asyncio.get_running_loop().run_in_executor(workers, self._service.jobs, asked)
        ticket = Ticket(jobs, deadline)
        self._scheduler.submit(ticket)
        answers = shape(
            self._service.name, self._service.token_bytes,
            choices=len(jobs), per_prompt=asked.n, logprobs=asked.top_logprobs_wanted is not None,
        )  # fmt: skip
        note = _Note(request.scope, self._metrics, ticket, answers)
        if asked.stream:
            return EventStream(self._streamed(ticket, answers, asked.include_usage, note), ticket)
        try:
            await unless_disconnected(request.receive, self._gathered(ticket, answers))
        finally:
            ticket.cancel()
            note.finished()
        whole = await asyncio.get_running_loop().run_in_executor(self._workers, answers.whole)
        return Response(whole, media_type="application/json")

    async def _gathered(self, ticket: Ticket, answers: Answers) -> None:
        async for events in ticket.events():
            for index, event in events:
                answers.add(index, event)

    async def _streamed(self, ticket: Ticket, answers: Answers, usage: bool, note: _Note) -> AsyncIterator[bytes]:
        """The parts of the body. All that has come goes out together: a client that reads slowly gets larger parts."""
        nothing_yet: dict[str, Any] = {"usage": None} if usage else {}
        try:
            openings = [answers.opening(index) for index in range(len(ticket.jobs))]
            if first := b"".join(server_sent(opening | nothing_yet) for opening in openings if opening):
                yield first
            async for events in ticket.events():
                chunks = [answers.chunk(index, event) for index, event in events]
                if part := b"".join(server_sent(chunk | nothing_yet) for chunk in chunks if chunk):
                    yield part
            yield (server_sent(answers.last_chunk()) if usage else b"") + DONE
        except ApiError as error:  # too late for a status
            note.status = error.status
            yield server_sent(error.body()) + DONE
        finally:
            note.finished()


class _Note:
    """What the log and the metrics are told of an answer."""

    def __init__(self, scope: Scope, metrics: Metrics, ticket: Ticket, answers: Answers) -> None:
        self._scope, self._metrics, self._ticket, self._answers = scope, metrics, ticket, answers
        self.status: int | None = None  # where it turned out after the header was sent

    def finished(self) -> None:
        """There is nothing more to come."""
        ends = [end for end in self._answers.finished if end is not None]
        self._metrics.finished(self._ticket, ends, time.monotonic())
        first = self._ticket.first_token
        usage = self._answers.usage()
        self._scope["fbiedge.log"] = (
            self.status,
            f"prompt={usage['prompt_tokens']} cached={usage['prompt_tokens_details']['cached_tokens']} "
            f"generated={usage['completion_tokens']}"
            + (f" first={first - self._ticket.submitted:.3f}s" if first else "")
            + f" end={','.join(sorted({_end(end) for end in ends})) or 'none'}",
        )


class EventStream(Response):
    """Server-sent events, as long as the client stays."""

    def __init__(self, parts: AsyncIterator[bytes], ticket: Ticket) -> None:
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._parts, self._ticket = parts, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await unless_disconnected(receive, self._send(send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._ticket.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._parts) as parts:  # type: ignore[type-var]
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})


class RequestLog:
    """Middleware: a line for each request, without a word of what was said."""

    def __init__(self, app: ASGIApp, log: Log, metrics: Metrics, paths: list[str]) -> None:
        self._app, self._log, self._metrics = app, log, metrics
        self._paths = {path for path in paths if "{" not in path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status: int | None = None

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except ClientDisconnect:
            status = _CLIENT_LEFT
        finally:
            late_status, details = scope.get("fbiedge.log", (None, ""))
            status = late_status or status or 500
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.request(path, status)
            shown = path if path != "other" else quote(scope["path"][:80])
            client = scope["client"][0] if scope.get("client") else "-"
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            seconds = time.monotonic() - started
            method = scope["method"] if scope["method"].isalpha() else "-"
            self._log(f"{now} {client} {method[:10]} {shown} {status} {seconds:.3f}s {details}".rstrip())


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled where the client leaves before it. Raises ClientDisconnect."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _end(end: Finished) -> str:
    return "timeout" if end.timed_out else end.stats.finish_reason


async def _explain(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _explain_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = "GET /v1/models, POST /v1/chat/completions, POST /v1/completions, GET /health, GET /metrics"
    told = ApiError(error.status_code, f"{error.detail.lower()}; there is {known}")
    return JSONResponse(told.body(), error.status_code, error.headers)


async def _explain_bug(request: Request, error: Exception) -> Response:
    print(f"error: {type(error).__name__} in a request; please report it", file=sys.stderr)
    return JSONResponse(ApiError(500, "the server failed; its log says more").body(), 500)
