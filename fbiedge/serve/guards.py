"""Who may ask, and how much they may send.

A server on loopback is open to every program of this machine, a browser among them. So that no web page can use it:

    Host           must name this server: a page of evil.example whose name suddenly resolves to 127.0.0.1 (DNS rebinding)
                   sends its own name
    Content-Type   must be application/json: browsers ask before they send that to another origin, and are told no unless
                   its origin is allowed
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .api_error import ApiError
from .options import ServerOptions

OPEN_PATHS = ("/health",)  # without a key


class Guard:
    """Middleware that checks Host and API key."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._key = None if options.api_key is None else _digest(options.api_key)
        names = {"localhost", "127.0.0.1", "[::1]", _bracketed(options.host), *options.allowed_hosts}
        # Who listens to the network goes by names that aren't known here, unless they are said.
        self._hosts = {name.lower() for name in names} if options.is_loopback or options.allowed_hosts else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        if self._hosts is not None:
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in self._hosts:
                raise ApiError(403, "this server has another name; --allowed-host NAME adds one", code="unknown_host")
        if self._key is not None and path not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Digests, because comparing takes constant time only where lengths are the same.
            if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
                raise ApiError(
                    401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
                )


async def read_body(request: Request, options: ServerOptions) -> bytes:
    """The body, which is JSON by its header. Raises ApiError, ClientDisconnect."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body's Content-Type is not application/json")
    if "content-encoding" in request.headers:
        raise ApiError(415, "the body has a Content-Encoding; send it plain")
    limit = options.max_body_bytes
    too_long = ApiError(413, f"the body is longer than {limit:,} bytes", code="body_too_long")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_long  # before any of it is read
    body = bytearray()

    async def read() -> None:
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body.extend(message.get("body", b""))
            if len(body) > limit:
                raise too_long
            if not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(read(), options.client_timeout)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took longer than {options.client_timeout:g} s") from None
    return bytes(body)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
