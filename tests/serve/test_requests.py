"""Requests that can't be answered as they are: each a clear 4xx in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.bundled import MODEL
from support.server import RunningServer

JSON = {"Content-Type": "application/json"}
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
}


@pytest.fixture(autouse=True)
def still_alive(http: httpx.Client) -> Iterator[None]:
    """After whatever was sent."""
    yield
    assert http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 200


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error, in the shape that clients expect."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"] and len(body["error"]["message"]) < 300
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nul", b"[]", b"1", b'"text"', b"null", b'{"prompt": NaN}', b'{"messages": Infinity}', b"{'a': 1}",
        b'{"prompt": "a"} {"prompt": "b"}', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00\\ud800"}', b"\x00", b'{"prompt": "\x00"}', b"[" * 100_000, b'{"a":' * 100_000,
        b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", b'{"seed": 1' + b"0" * 5000 + b"}", b"\xef\xbb\xbf{}",
        b"a=b&c=d", b"<xml/>", b'{"prompt"',
    ],
    ids=range(25),
)  # fmt: skip
def test_bodies_that_are_no_request(http: httpx.Client, path: str, body: bytes) -> None:
    refused(http.post(path, content=body, headers=JSON))


NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty"]
COUNTS = ["n", "max_tokens", "top_k", "seed"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [*NUMBERS, *COUNTS])
def test_negative_numbers(http: httpx.Client, path: str, name: str) -> None:
    assert name in refused(http.post(path, json=PATHS[path] | {name: -1}))["message"]


@pytest.mark.parametrize("name", [*NUMBERS, *COUNTS])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400])
def test_numbers_that_are_none_or_too_large(http: httpx.Client, name: str, value: str) -> None:
    body = json.dumps(PATHS["/v1/completions"] | {name: 0}).replace(f'"{name}": 0', f'"{name}": {value}')
    answer = http.post("/v1/completions", content=body, headers=JSON)
    # A top_k and a limit may well be larger than there are tokens.
    if value[0] == "1" and value[1] == "0" and name in ("top_k", "max_tokens"):
        assert answer.status_code == 200
    else:
        refused(answer)


WRONG: list[Any] = [True, 1.5, "1", "", [], ["a"], {}, {"a": 1}, [[[]]], "\x00", "a" * 1000, -5, 1 << 70]
FIELDS = [
    "model", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "seed", "stop", "logit_bias", "response_format", "grammar", "regex", "json_schema", "cache_prompt",
    "logprobs", "top_logprobs", "prompt", "messages", "tools", "echo", "best_of", "suffix", "frequency_penalty",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FIELDS)
def test_wrong_types_everywhere(http: httpx.Client, path: str, name: str) -> None:
    """Each is refused, or is by chance a value that has a meaning; none is a failure of the server."""
    for value in WRONG:
        answer = http.post(path, json=PATHS[path] | {name: value})
        assert answer.status_code in (200, 400, 404), (value, answer.text)
        if answer.status_code != 200:
            refused(answer, answer.status_code)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("/v1/completions", {"temprature": 1}, "unknown field 'temprature'; did you mean temperature?"),
        ("/v1/completions", {"temperature": True}, "temperature is true: input should be a valid number"),
        ("/v1/completions", {"temperature": "hot"}, 'temperature is "hot": input should be a valid number'),
        ("/v1/completions", {"n": 0}, "n is 0: input should be greater than or equal to 1"),
        ("/v1/completions", {"n": 10**9}, "n is 1000000000: input should be less than or equal to 128"),
        ("/v1/completions", {"n": 100}, "the request asks for 100 answers, this server takes at most 11"),
        ("/v1/completions", {"prompt": None}, "prompt is missing"),
        ("/v1/completions", {"prompt": []}, "prompt is neither a text"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt is neither a text"),
        ("/v1/completions", {"prompt": [True]}, "prompt is neither a text"),
        ("/v1/completions", {"prompt": [1, 2048]}, "token ids of the prompt run from 1 to 2048, expected 0 to 2047"),
        ("/v1/completions", {"prompt": [-1]}, "token ids of the prompt run from -1 to -1"),
        ("/v1/completions", {"prompt": [10**30]}, "token ids of the prompt run from"),
        ("/v1/completions", {"stop": [""]}, "stop has an empty string"),
        ("/v1/completions", {"stop": ["a"] * 17}, "stop has 17 strings, expected at most 16"),
        (
            "/v1/completions",
            {"stream_options": {"include_usage": True}},
            "stream_options has no meaning without stream",
        ),
        ("/v1/completions", {"logit_bias": {"a": 1}}, "logit_bias has a key that is no token id"),
        ("/v1/completions", {"logit_bias": {"5000": 1}}, "logit_bias names a token that is none of 0 to 2047"),
        ("/v1/completions", {"logit_bias": {"5": 101}}, "logit_bias of token 5 is 101"),
        ("/v1/completions", {"logprobs": 21}, "logprobs is 21: input should be less than or equal to 20"),
        ("/v1/completions", {"echo": True}, "echo is not offered by this server; leave it out or send false"),
        ("/v1/completions", {"best_of": 3}, "best_of is not offered by this server; leave it out or send 1"),
        ("/v1/completions", {"frequency_penalty": 0.5}, "frequency_penalty is not offered"),
        ("/v1/completions", {"messages": []}, "unknown field 'messages'"),
        ("/v1/chat/completions", {"prompt": "a"}, "unknown field 'prompt'"),
        ("/v1/chat/completions", {"messages": []}, "messages is a JSON array: list should have at least 1 item"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 'messages.0.role is "tool"'),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a", "x": 1}]},
            "unknown field messages.0.x",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            "messages.0.content has a part of type 'image_url', expected text",
        ),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools is not offered by this server"),
        ("/v1/chat/completions", {"top_logprobs": 3}, "top_logprobs needs logprobs to be true"),
        ("/v1/chat/completions", {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens and max_completion_tokens"),
        ("/v1/chat/completions", {"response_format": {"type": "json_schema"}}, "response_format needs a json_schema"),
        ("/v1/chat/completions", {"response_format": {"type": "xml"}}, "response_format.type"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}, "regex": "a"}, "expected one of them"),
        ("/v1/chat/completions", {"regex": "("}, "regular expression"),
        ("/v1/chat/completions", {"grammar": "root ::= ("}, "grammar"),
    ],
)
def test_each_refusal_says_what_is_wrong(http: httpx.Client, path: str, changes: dict[str, Any], message: str) -> None:
    assert message in refused(http.post(path, json=PATHS[path] | changes))["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "seed": None, "stop": None},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1, "tools": [], "tool_choice": "none"},
        {"frequency_penalty": None, "tools": None, "response_format": {"type": "text"}, "temperature": 0},
        {"stream": True, "stream_options": {"include_usage": False}},
    ],
)
def test_what_asks_for_what_happens_anyway_is_accepted(http: httpx.Client, changes: dict[str, Any]) -> None:
    assert http.post("/v1/chat/completions", json=PATHS["/v1/chat/completions"] | changes).status_code == 200


def test_a_prompt_longer_than_the_context(http: httpx.Client) -> None:
    error = refused(http.post("/v1/completions", json={"prompt": "the cat " * 400}))
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == "the prompt has 803 tokens; this server takes at most 512"
    chat = {"messages": [{"role": "user", "content": "the cat " * 400}]}
    assert refused(http.post("/v1/chat/completions", json=chat))["code"] == "context_length_exceeded"


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_prompt_of_a_million_tokens(as_ids: bool) -> None:
    """Too long for the body's limit, unless that was raised."""
    prompt = [300] * 1_000_000 if as_ids else "cat " * 1_000_000
    with (
        RunningServer(MODEL, "--slots", 1, "--max-body-bytes", 1 << 24) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        error = refused(http.post("/v1/completions", json={"prompt": prompt}))
        assert error["code"] == "context_length_exceeded" and "this server takes at most 512" in error["message"]
        assert http.get("/health").status_code == 200


def test_a_body_of_a_hundred_megabytes_is_refused_before_it_is_read(http: httpx.Client, server: RunningServer) -> None:
    http.get("/health")
    before = server.resident_bytes()
    error = refused(http.post("/v1/completions", content=b" " * 100_000_000, headers=JSON), 413)
    assert error["message"] == "the body is longer than 1,048,576 bytes"
    assert server.resident_bytes() - before < 10_000_000
    with server.connect() as connection:  # who asks before sending is told at once, and nothing was sent
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_unknown_length_is_read_to_the_limit_only(http: httpx.Client, server: RunningServer) -> None:
    before = server.resident_bytes()
    parts = (b" " * 100_000 for _ in range(1000))
    refused(http.post("/v1/completions", content=parts, headers=JSON), 413)
    assert server.resident_bytes() - before < 10_000_000


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}, JSON | {"Content-Encoding": "gzip"}])
def test_other_kinds_of_bodies(http: httpx.Client, headers: dict[str, str]) -> None:
    refused(http.post("/v1/completions", content=b'{"prompt": "Hi"}', headers=headers), 415)
    json_too = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert http.post("/v1/completions", content=b'{"prompt": "Hi"}', headers=json_too).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1", 404), ("POST", "/v1/embeddings", 404), ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/%00%ff", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/completions", 405),
        ("POST", "/health", 405), ("BREW", "/v1/completions", 405),
    ],
)  # fmt: skip
def test_other_paths_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    refused(http.request(method, path), status)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n\r\n", b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nConnection: close\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n" + b"Host: localhost\r\n" * 2 + b"\r\n",
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_http(server: RunningServer, request_bytes: bytes) -> None:
    """A 4xx, or no answer at all."""
    assert server.exchange(request_bytes)[:10] in (b"", b"HTTP/1.1 4")


def test_a_websocket_is_not_opened(server: RunningServer) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    assert server.exchange(head).startswith(b"HTTP/1.1 200 ")


def test_requests_of_chance(http: httpx.Client) -> None:
    """Bodies with parts cut out, doubled, swapped for others: 200 or a clear 4xx."""
    chance = random.Random(6)
    parts: list[Any] = [*WRONG, 0, 1, None, 0.5, "Hi", [1, 2, 3], {"type": "text"}, {"type": "json_object"}, {"5": 1}]
    for _ in range(150):
        path = chance.choice(list(PATHS))
        body = dict(PATHS[path]) | {chance.choice(FIELDS): chance.choice(parts) for _ in range(chance.randrange(4))}
        content = bytearray(json.dumps(body).encode())
        for _ in range(chance.choice([0, 0, 1, 3])):
            at = chance.randrange(len(content))
            content[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        answer = http.post(path, content=bytes(content), headers=JSON)
        assert answer.status_code in (200, 400, 404), (content, answer.text)


def test_a_schema_that_is_too_much(http: httpx.Client) -> None:
    """It is refused or kept to, and in either case soon."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    wide = {"type": "object", "properties": {f"p{index}": {"enum": list(range(50))} for index in range(800)}}
    long = {"type": "string", "minLength": 10**9}
    broad = {"type": "string", "pattern": "(a{1,1000}){1,1000}"}
    for schema in (deep, wide, long, broad, {"$ref": "#"}, {"type": 5}, {"type": "array", "minItems": 10**12}):
        started = time.monotonic()
        answer = http.post(
            "/v1/chat/completions",
            json=PATHS["/v1/chat/completions"]
            | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
        )
        assert answer.status_code in (200, 400), answer.text
        assert time.monotonic() - started < 10


def test_a_constraint_of_a_megabyte(http: httpx.Client) -> None:
    """It would keep others' constraints waiting for most of a minute."""
    schema = {"properties": {f"p{index}": {"type": "string", "pattern": "[a-z]{1,100}"} for index in range(4000)}}
    formatted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for name, value in (
        ("response_format", formatted),
        ("grammar", "root ::= " + 70_000 * "x"),
        ("regex", "a" * 70_000),
    ):
        error = refused(http.post("/v1/completions", json={"prompt": "Hi", name: value}))
        assert "is longer than 65,536 characters" in error["message"]
