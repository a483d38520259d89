"""Serves a fixed list of files on this machine, and nothing else.

A path is looked up in a table made at the start; it never becomes a name in the file system, so there is nothing to
traverse. Only GET and HEAD are answered. A request must name this machine in its Host header: a site whose name was
made to point to 127.0.0.1 (DNS rebinding) names itself there, and is refused.

The headers isolate the page from other origins, which browsers ask for before they give WebAssembly threads, and allow
it to load from this server only: should anything in the page ever try to reach another, the browser refuses.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import shutil
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, BinaryIO

from .. import __version__
from ..errors import UsageError

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; "
    "connect-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_MOST_CONNECTIONS = 64
_CLIENT_SECONDS = 30  # without a byte from or to a client


@dataclass(frozen=True)
class Resource:
    """What is served under one path: a file, read when it is asked for, or bytes."""

    content: Path | bytes
    content_type: str = ""

    def open(self) -> tuple[BinaryIO | None, bytes, int, str]:
        """-> the file or the bytes, its size in bytes and its entity tag."""
        if isinstance(self.content, bytes):
            return None, self.content, len(self.content), f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'
        file = self.content.open("rb")
        status = os.fstat(file.fileno())
        return file, b"", status.st_size, f'"{status.st_size:x}-{status.st_mtime_ns:x}"'

    @property
    def mime(self) -> str:
        """The Content-Type; a file's by its name."""
        suffix = self.content.suffix if isinstance(self.content, Path) else ""
        return self.content_type or _TYPES.get(suffix, "application/octet-stream")


class PageServer(ThreadingHTTPServer):
    """Serves `resources` by their paths. With port 0 the system chooses one; see `url`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, host: str, port: int, resources: Mapping[str, Resource]) -> None:
        """Raises UsageError for an address that can't be listened on."""
        self.resources = dict(resources)
        self.host = host
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self.address_family = family
            super().__init__(address, _Handler)  # type: ignore[arg-type]
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"can't listen on {host} port {port}: {reason}; choose another with --port") from error

    @property
    def url(self) -> str:
        """The page's address."""
        name = "localhost" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server_address[1]}/"

    def is_this_machine(self, header: str) -> bool:
        """Whether a Host header names this server, by its name, an address, or as localhost."""
        match = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::(\d{1,5}))?|([^:\[\]]+)(?::(\d{1,5}))?", header)
        if match is None or int(match[2] or match[4] or 80) != self.server_address[1]:
            return False
        name = (match[1] or match[3]).lower()
        if name in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # An address can't be rebound. Beyond loopback, any of this machine's may have been typed.
        return address.is_loopback or not ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def server_bind(self) -> None:
        """As in the base class, which besides asks DNS what this machine is called: nobody here wants to know."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """As in the base class, with at most so many threads; who comes when there are too many is sent away."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no thread for it
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As in the base class."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away or says nothing is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = _CLIENT_SECONDS

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def _answer(self, *, with_body: bool) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.is_this_machine(hosts[0].strip()):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.send_error(HTTPStatus.BAD_REQUEST)  # a body, which we'd have to read to find the next request
            return
        resource = self.server.resources.get(self.path.partition("?")[0])
        if resource is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            file, content, size, tag = resource.open()
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            # A browser asks each time and gets 304 where nothing has changed, so an update is never half an update.
            headers = {"Cache-Control": "no-cache", "ETag": tag}
            if tag in [given.strip() for given in self.headers.get("If-None-Match", "").split(",")]:
                self._send_head(HTTPStatus.NOT_MODIFIED, headers)
                return
            self._send_head(HTTPStatus.OK, headers | {"Content-Type": resource.mime, "Content-Length": str(size)})
            if not with_body:
                return
            if file is None:
                self.wfile.write(content)
            else:
                shutil.copyfileobj(file, self.wfile, 1 << 20)
        finally:
            if file is not None:
                file.close()

    def _send_head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {"Date": formatdate(usegmt=True), "Server": f"fbiedge/{__version__}", **_HEADERS}.items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A short text instead of the base class's page, and the end of the connection."""
        status = HTTPStatus(code)
        body = f"{status.value} {status.phrase}\n".encode()
        self.close_connection = True
        headers = {
            "Connection": "close", "Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
        }  # fmt: skip
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        self._send_head(status, headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the terminal is for the user."""
