"""`fbiedge serve` as a process of its own, on a free port."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any


class RunningServer:
    """Use as a context manager: it is there at the start and gone at the end."""

    def __init__(self, model: Path, *options: object, **process: Any) -> None:
        self._arguments = [str(part) for part in (model, "--port", 0, *options)]
        self._options = process
        self.lines: list[str] = []  # of stderr
        self._said = threading.Condition()

    def __enter__(self) -> RunningServer:  # noqa: PYI034 -- Python 3.10 has no Self
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fbiedge.cli", "serve", *self._arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", **self._options,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        try:
            line = self.wait_for(r"serves .* at (http://\S+)/v1")
            found = re.search(r"http://(\S+):(\d+)/v1", line)
            assert found, line
        except BaseException:
            self.process.kill()  # without a server there is no end of the block that would
            raise
        self.host, self.port = found[1].strip("[]"), int(found[2])
        self.url = f"http://{found[1]}:{found[2]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """The first line of stderr, past or to come, in which `pattern` is found."""
        with self._said:
            done = self._said.wait_for(lambda: self._found(pattern) or self.process.poll() is not None, seconds)
            line = self._found(pattern)
        assert done and line, f"no {pattern!r} in\n" + "\n".join(self.lines)
        return line

    def connect(self) -> socket.socket:
        """A connection as it is."""
        return socket.create_connection((self.host, self.port), timeout=30)

    def exchange(self, request: bytes) -> bytes:
        """What comes back for these bytes until the server closes the connection."""
        with self.connect() as connection:
            connection.sendall(request)
            return read_all(connection)

    def resident_bytes(self) -> int:
        """Memory of the process. Linux."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024

    def _found(self, pattern: str) -> str | None:
        return next((line for line in self.lines if re.search(pattern, line)), None)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line.rstrip("\n"))
                self._said.notify_all()
        self.process.wait()
        with self._said:
            self._said.notify_all()


def read_all(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received
