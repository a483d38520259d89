"""The server's life: it listens, says so, answers, and ends without leaving anybody halfway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from typing import Any

import uvicorn

from ..cached_session import CachedSession
from ..errors import UsageError
from .app import build_app
from .connection import connection_class
from .options import ServerOptions
from .scheduler import Scheduler
from .service import Service

GRACE_SECONDS = 5.0  # for answers under way when the server is told to end


def serve(session: CachedSession, options: ServerOptions) -> None:
    """Answer until Ctrl-C (KeyboardInterrupt) or SIGTERM (SystemExit). Raises UsageError, ModelFileError."""
    service = Service(session, options)
    scheduler = Scheduler(service.sessions(), service.tokenizer, service.ends, queue=options.queue)
    listener = _listen(options.host, options.port)
    try:
        if not options.is_loopback and options.api_key is None:
            _say(f"warning: everybody who can reach {options.host} can use this server; set FBIEDGE_API_KEY")
        if not service.chats:
            _say("warning: the model has no chat template; /v1/chat/completions is refused")
        elif problem := service.check_template():
            _say(f"warning: {problem}; /v1/chat/completions will be refused")
        asyncio.run(_serve(service, scheduler, options, listener))
    finally:
        listener.close()
        service.close()


async def _serve(service: Service, scheduler: Scheduler, options: ServerOptions, listener: socket.socket) -> None:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what clients do wrong is no news
    config: Any = uvicorn.Config(
        build_app(service, scheduler, options, _say),
        http=connection_class(options.client_timeout, options.max_connections), ws="none", lifespan="off",
        log_config=None, access_log=False, server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=int(GRACE_SECONDS) + 2,
    )  # fmt: skip
    scheduler.start()
    try:
        await _Server(config, scheduler, lambda: _announce(service, options, listener)).serve([listener])
    finally:
        scheduler.close(0)
        scheduler.join(GRACE_SECONDS)


class _Server(uvicorn.Server):
    def __init__(self, config: Any, scheduler: Scheduler, announce: Any) -> None:
        super().__init__(config)
        self._scheduler, self._announce = scheduler, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where, as soon as somebody may come."""
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, let answers under way end, then end them: their clients are told."""
        self._scheduler.close(GRACE_SECONDS)
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    """Raises UsageError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        other = "; choose another port with --port, 0 for any free one" if port else ""
        known = not isinstance(error, socket.gaierror) and error.errno
        reason = os.strerror(error.errno or 0) if known else error.strerror or error
        raise UsageError(f"can't listen on {host} port {port}: {reason}{other}") from error


def _announce(service: Service, options: ServerOptions, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::", "localhost") else options.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    session = service.session
    _say(
        f"fbiedge serves {service.name} at {url} ({options.slots} slots of {session.capacity} tokens, "
        f"{session.description}); Ctrl-C ends it"
    )
    key = "" if options.api_key is None else ' -H "Authorization: Bearer $FBIEDGE_API_KEY"'
    path, question = (
        ("chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]')
        if service.chats
        else ("completions", '"prompt": "Once upon a time"')
    )
    _say(f"try: curl {url}/{path}{key} -H 'Content-Type: application/json' -d '{{{question}}}'")


def _say(line: str) -> None:
    """A line on stderr."""
    with contextlib.suppress(OSError, ValueError):  # whoever read them has gone
        print(line, file=sys.stderr, flush=True)
