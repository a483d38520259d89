"""The server as a program: what it says, whom it lets in, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from support.bundled import MODEL, PROMPT
from support.server import RunningServer

from fbiedge.engines import open_session
from fbiedge.errors import UsageError
from fbiedge.serve import service
from fbiedge.serve.options import ServerOptions

from .conftest import client_of
from .test_connections import metric, wait_until
from .test_sharing import ENDLESS

KEY = "a-key-of-the-tests"
BODY = {"prompt": "Hi", "max_tokens": 1}


def test_what_a_user_sees(server: RunningServer) -> None:
    """An address, and a command that works as it is printed."""
    first, second = server.lines[:2]
    assert re.fullmatch(
        r"fbiedge serves default at http://127\.0\.0\.1:\d+/v1 \(3 slots of 512 tokens, .*\); Ctrl-C ends it", first
    )
    assert second.startswith("try: curl http://127.0.0.1:")
    printed = subprocess.run(second.removeprefix("try: "), shell=True, capture_output=True, text=True, check=True)
    assert '"role":"assistant"' in printed.stdout
    line = server.wait_for("POST /v1/chat/completions 200 ")
    assert re.search(
        r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d+s "
        r"prompt=\d+ cached=\d+ generated=\d+ first=\d+\.\d+s end=\w+$", line
    )  # fmt: skip


def test_the_log_says_nothing_of_what_was_said_and_no_line_can_be_forged(server: RunningServer) -> None:
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a secret word", "max_tokens": 2, "secret": 1})
    httpx.get(f"{server.url}/a%0Aforged%1B[31m line")
    line = server.wait_for("GET /a%0Aforged")
    assert "\x1b" not in line and not any(line.startswith("forged") for line in server.lines)
    assert "secret" not in "\n".join(server.lines)


def test_metrics(server: RunningServer) -> None:
    httpx.post(f"{server.url}/v1/completions", json=BODY)
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert float(values["fbiedge_slots"]) == 3
    assert float(values['fbiedge_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(values["fbiedge_generated_tokens_total"]) >= 1 and float(values["fbiedge_prompt_tokens_total"]) >= 2
    assert float(values["fbiedge_time_to_first_token_seconds_count"]) >= 1
    assert float(values["process_resident_memory_bytes"]) > 1e7
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:9999", 200), ("127.0.0.1", 200), ("LOCALHOST:1", 200), ("[::1]:80", 200),
        ("evil.example", 403), ("evil.example:8080", 403), ("localhost.evil.example", 403), ("", 403), ("192.168.0.1", 403),
    ],
)  # fmt: skip
def test_only_its_own_names_on_loopback(server: RunningServer, host: str, status: int) -> None:
    """So that no web page can reach it by a name of its own that resolves to 127.0.0.1."""
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == status


def test_no_web_page_may_ask(server: RunningServer) -> None:
    page = {"Origin": "https://page.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = httpx.options(f"{server.url}/v1/completions", headers=page | asked)
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers
    answer = httpx.get(f"{server.url}/v1/models", headers=page)
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_that_may_and_a_key_and_another_name() -> None:
    environment = {**os.environ, "FBIEDGE_API_KEY": KEY}
    options = ("--cors-origin", "https://page.example", "--allowed-host", "model.example")
    with RunningServer(MODEL, *options, env=environment) as server, httpx.Client(base_url=server.url) as http:
        assert KEY not in "\n".join(server.lines)
        page = {"Origin": "https://page.example"}
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = http.options("/v1/completions", headers=page | asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        other = http.options("/v1/completions", headers={"Origin": "https://other.example"} | asked)
        assert "access-control-allow-origin" not in other.headers
        for headers in ({}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer x"}):
            for path in ("/v1/models", "/metrics", "/nothing"):
                answer = http.get(path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").status_code == 200
        right = {"Authorization": f"Bearer {KEY}"}
        assert http.get("/v1/models", headers=right | page).headers["access-control-allow-origin"] == page["Origin"]
        assert http.get("/v1/models", headers=right | {"Host": "model.example"}).status_code == 200
        with client_of(server, api_key=KEY) as client:
            assert client.completions.create(model="default", prompt="Hi", max_tokens=1)
        with client_of(server) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_ends_within_seconds_and_tells_its_clients(number: signal.Signals, code: int) -> None:
    """A short answer under way is finished, a long one and those that wait are ended with an error."""
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, changes: dict[str, Any]) -> None:
        body = {"prompt": PROMPT} | ENDLESS | changes
        answers[name] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

    with RunningServer(MODEL, "--slots", 1, "--queue", 200) as server:
        asked = {"streamed": {"stream": True}, "whole": {"n": 100}, "waiting": {"n": 20}}
        threads = [threading.Thread(target=ask, args=item) for item in asked.items()]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=server.url) as http:
            wait_until(lambda: metric(http, "fbiedge_answers_waiting") >= 115)
        started = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(20) == code
        assert time.monotonic() - started < 12
        for thread in threads:
            thread.join()
    assert answers["streamed"].status_code == 200 and answers["streamed"].text.endswith("data: [DONE]\n\n")
    for name in ("whole", "waiting"):
        assert answers[name].status_code == 503 and answers[name].json()["error"]["code"] == "shutting_down"
    assert not [line for line in server.lines if "Traceback" in line or "Error" in line]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fbiedge.cli", "serve", *map(str, arguments)],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", 70000], "port is 70000, expected a number from 0 to 65535"),
        (["--slots", 0], "slots is 0, expected a number from 1 to 256"),
        (["--queue", -1], "queue is -1"),
        (["--request-timeout", "nan"], "request-timeout is nan, expected seconds above 0"),
        (["--client-timeout", 0], "client-timeout is 0"),
        (["--api-key", ""], "the API key is empty"),
        (["--host", "no.such.host.invalid"], "can't listen on no.such.host.invalid"),
        (["/nonexistent.onnx"], "/nonexistent.onnx"),
    ],
)
def test_options_that_can_not_be_used(options: list[object], message: str) -> None:
    done = command(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr) and message in done.stderr


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command(MODEL, "--port", taken.getsockname()[1])
    assert done.returncode == 2
    assert "Address already in use; choose another port with --port" in done.stderr


def test_caches_that_memory_can_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "memory_bytes", lambda: 5_000_000)
    session = open_session(MODEL)
    with pytest.raises(UsageError, match="5 slots with a context of 512 tokens take 0.0 GB, more than there is memory"):
        service.Service(session, ServerOptions(slots=5)).sessions()
    assert len(service.Service(session, ServerOptions(slots=1)).sessions()) == 1


def test_the_network_without_a_key_is_warned_of() -> None:
    with RunningServer(MODEL, "--host", "0.0.0.0") as server:
        server.wait_for("warning: everybody who can reach 0.0.0.0 can use this server; set FBIEDGE_API_KEY")
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": "any.name"}).status_code == 200


@pytest.mark.parametrize(
    "options", [{"api_key": " a"}, {"api_key": "ü"}, {"max_body_bytes": 0}, {"request_timeout": float("inf")}]
)
def test_more_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServerOptions(**options)


def test_loopback() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert ServerOptions(host=host).is_loopback
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        assert not ServerOptions(host=host).is_loopback
