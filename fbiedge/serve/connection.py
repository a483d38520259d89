"""One TCP connection, as uvicorn handles it, with bounds on the time that a client may take.

uvicorn ends a connection that is idle between two requests. A client that sends a header a byte at a time, or never reads
what it is sent, could hold one for ever; enough of them, and nobody else gets in. So there are two clocks here: one runs
while a request's header is awaited, one while the system holds bytes that the client doesn't take.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_LINGER_SECONDS = 2.0  # for the rest of a body that was refused: to close at once would lose the answer on its way
_SEND_BYTES = 1 << 16  # that the system holds for a client; by itself Linux takes up to 4 MB of one that doesn't read
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Connection(H11Protocol):
    """Use `connection_class`."""

    client_timeout: float
    max_connections: int
    _header_clock: asyncio.TimerHandle | None = None
    _write_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        with contextlib.suppress(OSError):  # it has gone already
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        transport.set_write_buffer_limits(high=0)  # so that pause_writing() says that there are bytes not taken
        if len(self.connections) > self.max_connections:
            transport.write(_FULL)
            transport.close()
        self._await_header(self.client_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        for clock in (self._header_clock, self._write_clock):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some of a request. A body's time is up to whoever reads it."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._header_clock is not None and self.cycle is not None and not self.cycle.response_complete:
            self._header_clock.cancel()
            self._header_clock = None

    def on_response_complete(self) -> None:
        """The next request is awaited."""
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered:  # else it was there already
            self._await_header(self.client_timeout if not answered.more_body else _LINGER_SECONDS)

    def pause_writing(self) -> None:
        """There are bytes that the client doesn't take."""
        super().pause_writing()
        self._write_clock = self.loop.call_later(self.client_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """It has taken them all."""
        super().resume_writing()
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None

    def _await_header(self, seconds: float) -> None:
        if self._header_clock is not None:
            self._header_clock.cancel()
        self._header_clock = self.loop.call_later(seconds, self.transport.abort)


def connection_class(client_timeout: float, max_connections: int) -> Any:
    """The protocol for uvicorn."""
    return type("Connection", (Connection,), {"client_timeout": client_timeout, "max_connections": max_connections})
