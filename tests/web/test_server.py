"""The page's server gives what is on its list, to who names this machine, and nothing else to nobody else."""

from __future__ import annotations

import functools
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.bundled import MODEL
from support.tiny_model import CHAT_TEMPLATE, tiny_model

from fbiedge.errors import UsageError
from fbiedge.model_file import ModelFile
from fbiedge.web import assets, server
from fbiedge.web.server import PageServer, Resource
from fbiedge.web.site import PAGE, make_site

http_get = functools.partial(httpx.get, timeout=60)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """A server of the bundled model, with empty files for libraries."""
    libraries = {name: tmp_path_factory.mktemp("lib") / name for name in assets.LIBRARIES}
    for path in libraries.values():
        path.write_bytes(b"")
    with PageServer("127.0.0.1", 0, make_site(ModelFile.open(MODEL), libraries)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(site: PageServer, request: bytes) -> bytes:
    """What comes back for raw bytes, until the server closes the connection."""
    with socket.create_connection(site.server_address[:2], timeout=60) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def get(site: PageServer, path: str, *headers: str, method: str = "GET", host: str | None = None) -> bytes:
    host = host or f"127.0.0.1:{site.server_address[1]}"
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]
    return ask(site, "\r\n".join(lines).encode("latin-1"))


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_everything_on_the_list_is_served_with_its_type(site: PageServer) -> None:
    types = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".html": "text/html",
             ".svg": "image/svg+xml", ".wasm": "application/wasm", ".json": "application/json"}  # fmt: skip
    for path in site.resources:
        answer = http_get(f"{site.url.rstrip('/')}{path}")
        assert answer.status_code == 200, path
        wanted = types.get(Path(path).suffix or ".html", "application/octet-stream")
        assert answer.headers["content-type"].partition(";")[0] == wanted, path
    assert http_get(f"{site.url}model/default.onnx").content == MODEL.read_bytes()
    assert http_get(site.url).content == (PAGE / "index.html").read_bytes()


def test_the_page_is_isolated_and_may_load_from_here_only(site: PageServer) -> None:
    for path in ("/", "/worker.js", "/model.json", "/nowhere"):
        headers = http_get(f"{site.url.rstrip('/')}{path}").headers
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-embedder-policy"] == "require-corp"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["connect-src"] == policy["worker-src"] == "'self'"
        assert policy["script-src"] == "'self' 'wasm-unsafe-eval'"
        assert "*" not in headers["content-security-policy"] and "http" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/../cli.py", "/page/../server.py", "/..%2fcli.py", "/%2e%2e/cli.py", "/....//cli.py", "//etc/passwd", "/etc/passwd",
        "/model/../default.onnx", "/model/%2e%2e/README.md", "/model/", "/model", "/lib/", "/server.py", "/page/main.js",
        "/index.html/", "/INDEX.HTML", "/main.js%00.html", "/main.js\x01", "\\main.js", "main.js", "..", "*",
        "file:///etc/passwd", "http://127.0.0.1/etc/passwd", "/~root/.bashrc", "/npm/package.json", "/é",
    ],
)  # fmt: skip
def test_nothing_beside_the_list(path: str, site: PageServer) -> None:
    answer = get(site, path)
    assert status(answer) in (400, 404)
    assert answer.endswith((b"404 Not Found\n", b"400 Bad Request\n"))


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_other_methods_are_refused(method: str, site: PageServer) -> None:
    answer = get(site, "/", "Content-Length: 5", method=method)
    assert status(answer) == 405 and b"Allow: GET, HEAD" in answer


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "get", "GE T", "X" * 1000, "<script>"])
def test_strange_methods_are_refused(method: str, site: PageServer) -> None:
    answer = get(site, "/", method=method)
    assert status(answer) in (400, 501) and b"<" not in answer


def test_head_has_no_body(site: PageServer) -> None:
    answer = get(site, "/model/default.onnx", "Connection: close", method="HEAD")
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")
    assert f"Content-Length: {MODEL.stat().st_size}\r\n".encode() in answer


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "localhost.evil.example:{port}",
        "127.0.0.1", "127.0.0.1:1", "192.168.1.7:{port}", "[::ffff:192.168.1.7]:{port}", "", ":{port}", "0.0.0.0:{port}",
        "127.0.0.1:{port}, evil.example", "127.0.0.1:{port}@evil.example", "2130706433:{port}", "[localhost]:{port}",
    ],
)  # fmt: skip
def test_a_site_that_was_rebound_to_this_machine_is_refused(host: str, site: PageServer) -> None:
    named = host.format(port=site.server_address[1]) or " "
    assert status(get(site, "/", host=named)) == 421


def test_a_request_names_one_host(site: PageServer) -> None:
    assert status(get(site, "/", "Host: evil.example")) == 421
    assert status(ask(site, b"GET / HTTP/1.1\r\n\r\n")) == 421
    assert status(ask(site, b"GET / HTTP/1.0\r\n\r\n")) == 421


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LocalHost:{port}", "[::1]:{port}", "127.1.2.3:{port}"]
)
def test_this_machine_has_several_names(host: str, site: PageServer) -> None:
    assert status(get(site, "/", "Connection: close", host=host.format(port=site.server_address[1]))) == 200


def test_with_all_interfaces_any_address_may_be_typed_and_still_no_foreign_name() -> None:
    with PageServer("0.0.0.0", 0, {}) as running:
        port = running.server_address[1]
        assert running.url == f"http://localhost:{port}/"
        assert running.is_this_machine(f"192.168.1.7:{port}") and running.is_this_machine(f"localhost:{port}")
        assert not running.is_this_machine(f"evil.example:{port}") and not running.is_this_machine("192.168.1.7:1")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: 1\r\n" % i for i in range(200)) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00" * 100 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"\r\n\r\n",
        b"\x00" * 1000,
        b"GET",
    ],
    ids=["path", "header", "headers", "tls", "version", "empty", "zeros", "half"],
)
def test_malformed_requests_get_an_error_and_the_server_lives(request_: bytes, site: PageServer) -> None:
    answer = ask(site, request_)
    # What names no version of HTTP gets an answer without a head.
    assert answer in (b"", b"400 Bad Request\n", b"505 HTTP Version Not Supported\n") or 400 <= status(answer) < 600
    assert status(get(site, "/", "Connection: close")) == 200


def test_a_request_with_a_body_ends_the_connection(site: PageServer) -> None:
    """Or what follows would be taken for another request."""
    port = site.server_address[1]
    smuggled = f"GET /model.json HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
    for header in (f"Content-Length: {len(smuggled)}", "Transfer-Encoding: chunked"):
        answer = get(site, "/", header, "", smuggled)
        assert status(answer) == 400 and answer.count(b"HTTP/1.1") == 1


def test_what_has_not_changed_is_not_sent_again(site: PageServer) -> None:
    for path in ("model/default.onnx", "model.json", "style.css"):
        first = http_get(site.url + path)
        assert first.headers["cache-control"] == "no-cache"
        again = http_get(site.url + path, headers={"If-None-Match": f'"x", {first.headers["etag"]}'})
        assert again.status_code == 304 and again.content == b""


def test_external_data_is_served_beside_the_graph_and_a_file_that_is_gone_is_404(tmp_path: Path) -> None:
    data = tmp_path / "weights.data"
    data.write_bytes(b"1234")
    resources = {"/model/weights.data": Resource(data)}
    with PageServer("127.0.0.1", 0, resources) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            assert http_get(f"{running.url}model/weights.data").content == b"1234"
            data.unlink()
            assert http_get(f"{running.url}model/weights.data").status_code == 404
        finally:
            running.shutdown()
            thread.join()


def test_silent_and_too_many_clients_do_not_keep_others_out(site: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server._Handler, "timeout", 0.3)
    silent = [socket.create_connection(site.server_address[:2]) for _ in range(80)]
    try:
        for connection in silent:
            connection.settimeout(60)
            assert connection.recv(1) == b""  # turned away, or given up on
        assert status(get(site, "/", "Connection: close")) == 200
    finally:
        for connection in silent:
            connection.close()


def test_metadata_that_utf8_has_no_form_for_is_served_all_the_same(tmp_path: Path) -> None:
    import onnx

    path = tiny_model(tmp_path, chat_template=CHAT_TEMPLATE)
    model = onnx.load(path)
    (config,) = (prop for prop in model.metadata_props if prop.key == "fbiedge.tokenizer_config")
    config.value = json.dumps({**json.loads(config.value), "unk_token": "\ud800"})
    onnx.save(model, path)
    described = make_site(ModelFile.open(path), {})["/model.json"].content
    assert isinstance(described, bytes)
    assert json.loads(described)["template"]["specialTokens"]["unk_token"] == "?"


def test_a_client_without_a_thread_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with PageServer("127.0.0.1", 0, {}) as running:
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        for _ in range(server._MOST_CONNECTIONS + 1):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                running.process_request(None, None)


def test_a_taken_port_is_one_line(site: PageServer) -> None:
    with pytest.raises(UsageError, match=r"can't listen on 127\.0\.0\.1 port \d+: .* choose another with --port"):
        PageServer("127.0.0.1", site.server_address[1], {})
    with pytest.raises(UsageError, match="can't listen on no such host"):
        PageServer("no such host", 0, {})
