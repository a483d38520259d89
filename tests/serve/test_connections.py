"""Clients that are slow, silent or gone: each has a limited time, and nobody else waits for them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from support.bundled import MODEL
from support.server import RunningServer, read_all

SECONDS = 1.5  # of the server's patience
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def impatient() -> Iterator[RunningServer]:
    with RunningServer(MODEL, "--slots", 2, "--client-timeout", SECONDS, "--max-connections", 12) as running:
        yield running


def asked(body: dict, extra: bytes = b"") -> bytes:
    """A whole request."""
    content = json.dumps(body).encode()
    return HEAD + extra + b"Content-Length: %d\r\n\r\n" % len(content) + content


def seconds_until_closed(connection: socket.socket, drip: bytes = b"") -> float:
    """Sending `drip` a byte at a time."""
    started = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - started < 20:
        try:
            if drip:
                connection.sendall(drip[:1])
            if not connection.recv(1000):
                return time.monotonic() - started
        except TimeoutError:
            continue
        except OSError:
            return time.monotonic() - started
    raise AssertionError("the connection is still open")


@pytest.mark.parametrize("drip", [b"", b"G", b"\r"])
def test_headers_that_never_end(impatient: RunningServer, drip: bytes) -> None:
    with impatient.connect() as connection:
        assert seconds_until_closed(connection, drip) < SECONDS + 5


def test_the_next_headers_on_a_connection_may_not_be_slower(impatient: RunningServer) -> None:
    with impatient.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert seconds_until_closed(connection, b"G") < SECONDS + 5


@pytest.mark.parametrize("drip", [b"", b" "])
def test_a_body_that_never_ends(impatient: RunningServer, drip: bytes) -> None:
    with impatient.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n{")
        connection.settimeout(0.2)
        received, started = b"", time.monotonic()
        while b"\r\n\r\n" not in received and time.monotonic() - started < 20:
            try:
                connection.sendall(drip)
                received += connection.recv(1000)
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408 ")
        assert seconds_until_closed(connection, drip) < 10


def test_who_never_reads_is_let_go_and_holds_no_slot(impatient: RunningServer) -> None:
    """Logprobs make answers large, so that the system's buffers, made small here, are soon full."""
    body = {"prompt": "The", "max_tokens": 500, "logprobs": 20, "n": 4, "stream": True, "temperature": 1.5, "stop": []}
    with impatient.connect() as patient, socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect((impatient.host, impatient.port))
        silent.sendall(asked(body | {"logit_bias": {str(token): -100 for token in range(6)}}))
        before = impatient.resident_bytes()
        patient.sendall(asked({"prompt": "The", "max_tokens": 5, "temperature": 0}))
        assert patient.recv(1000).startswith(b"HTTP/1.1 200")
        line = impatient.wait_for(r"POST /v1/completions 499 .* prompt=", 60)
        assert "end=" in line
        assert impatient.resident_bytes() - before < 50_000_000


def test_a_full_house_is_said_so_and_empties_again(impatient: RunningServer) -> None:
    connections = [impatient.connect() for _ in range(12)]
    try:
        with impatient.connect() as late:
            answer = read_all(late)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer
        time.sleep(SECONDS + 0.5)
        with httpx.Client(base_url=impatient.url) as http:
            assert http.get("/health").status_code == 200
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_who_leaves_frees_the_slot(impatient: RunningServer, streamed: bool) -> None:
    """Both slots are taken by answers of many seconds; then both clients leave."""
    endless = {"prompt": "The", "max_tokens": 500, "n": 16, "logit_bias": {str(token): -100 for token in range(6)}}
    with httpx.Client(base_url=impatient.url, timeout=60) as http:
        with impatient.connect() as leaving:
            leaving.sendall(asked(endless | {"stream": streamed}))
            wait_until(lambda: metric(http, "fbiedge_answers_running") == 2)
            assert metric(http, "fbiedge_answers_waiting") == 14
        wait_until(lambda: metric(http, "fbiedge_answers_running") == 0)
        assert metric(http, "fbiedge_answers_waiting") == 0
        assert http.post("/v1/completions", json={"prompt": "The", "max_tokens": 1}).status_code == 200


def test_many_requests_on_one_connection(impatient: RunningServer) -> None:
    """One after another, and sent all at once (pipelined)."""
    with httpx.Client(base_url=impatient.url) as http:
        for _ in range(20):
            assert http.post("/v1/completions", json={"prompt": "The", "max_tokens": 2}).status_code == 200
    request = asked({"prompt": "The", "max_tokens": 2})
    last = asked({"prompt": "The", "max_tokens": 2}, b"Connection: close\r\n")
    assert impatient.exchange(4 * request + last).count(b"HTTP/1.1 200 ") == 5


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def wait_until(true: object, seconds: float = 20) -> None:
    """Ask again until it is so."""
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
