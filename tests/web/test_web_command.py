"""`fbiedge web` on the command line: what it prints, how it ends, and one line for whatever it can't serve."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.bundled import MODEL

from fbiedge.web import assets

COMMAND = [sys.executable, "-m", "fbiedge.cli", "web", "--no-open", "--port", "0"]


@pytest.fixture
def fake_libraries(tmp_path: Path) -> Path:
    """A folder for --assets with empty libraries."""
    folder = tmp_path / "assets"
    for path in assets.LIBRARIES.values():
        target = folder / "node_modules" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    return folder


@contextmanager
def running(*arguments: str, **process: Any) -> Iterator[subprocess.Popen[str]]:
    """The command, which is gone at the end, whatever the test did."""
    command = [*COMMAND, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **process) as started:
        try:
            yield started
        finally:
            started.kill()


def refused(*arguments: str, **environment: str) -> str:
    """The one line of an error that ends the command with 2."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 2 and done.stdout == "", done
    *notes, line = done.stderr.splitlines()
    assert line.startswith("error: ") and all("bringing the page's libraries" in note for note in notes)
    return line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_prints_its_address_and_ends_when_told(number: int, code: int, fake_libraries: Path) -> None:
    with running("--assets", str(fake_libraries)) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        address = line.split()[0]
        assert address.startswith("http://127.0.0.1:") and "Ctrl-C ends" in line
        assert httpx.get(f"{address}model.json", timeout=60).json()["name"] == "default"
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stderr.read() == ""


def test_the_readmes_way_to_a_quick_page(fake_libraries: Path, tmp_path: Path) -> None:
    """Its two commands, with the bundled model for model.onnx."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^fbiedge (export model\.onnx .*)\nfbiedge web (.*)$", readme, re.MULTILINE)
    export, web = (command.split() for command in commands)
    shutil.copy(MODEL, tmp_path / "model.onnx")
    subprocess.run([sys.executable, "-m", "fbiedge.cli", *export], cwd=tmp_path, capture_output=True, check=True)
    with running(*web, "--assets", str(fake_libraries), cwd=tmp_path) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        described = httpx.get(f"{address}model.json", timeout=60).json()
    assert described["name"] == "web" and described["kvCache"] == "fp32", "a GPU takes it too"


def test_without_npm_it_says_what_to_do(tmp_path: Path) -> None:
    line = refused(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
    assert "npm is missing" in line and "--assets" in line
    assert list(tmp_path.iterdir()) == []


def fake_npm(folder: Path, script: str) -> None:
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_what_npm_says_is_passed_on_and_nothing_is_left(tmp_path: Path) -> None:
    fake_npm(
        tmp_path, "mkdir node_modules; echo 'npm error code ENOTFOUND' >&2; echo 'npm error no network' >&2; exit 1"
    )
    line = refused(XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "npm can't bring the page's libraries: code ENOTFOUND no network" in line
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_npm_is_asked_once_and_runs_no_scripts(tmp_path: Path) -> None:
    makes = "; ".join(
        f"mkdir -p node_modules/{Path(path).parent}; touch node_modules/{path}" for path in assets.LIBRARIES.values()
    )
    fake_npm(
        tmp_path,
        f'echo "$@" >> {tmp_path}/asked; cmp package-lock.json {assets._NPM_FILES}/package-lock.json || exit 1; {makes}',
    )
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    for _ in range(2):
        with running(env=environment) as process:
            assert process.stdout is not None and process.stdout.readline().startswith("http://")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 1 and asked[0].startswith("ci --ignore-scripts --omit=dev")
    kept = sorted(
        path.relative_to(tmp_path / "cache" / "fbiedge").parts[2:]
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file()
    )
    assert kept == sorted(Path(path).parts for path in assets.LIBRARIES.values()), "of all that npm brings"


def test_the_lock_names_every_package_by_its_hash_and_no_host() -> None:
    import json

    lock = (assets._NPM_FILES / "package-lock.json").read_text()
    packages = {name: entry for name, entry in json.loads(lock)["packages"].items() if name}
    assert packages and all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    assert "http" not in lock.replace('"url": "https://', "") and "resolved" not in lock


def test_what_cant_be_served_is_one_line(tmp_path: Path, fake_libraries: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.touch()
    line = refused(str(gguf))
    assert "is a GGUF" in line and "--to onnx --ops stock" in line
    assert "does not exist" in refused(str(tmp_path / "absent.onnx"))
    (tmp_path / "text.onnx").write_text("no model")
    assert "is not an ONNX file" in refused(str(tmp_path / "text.onnx"))
    assert "does not exist; --assets takes a folder" in refused(str(MODEL), "--assets", str(tmp_path))
    assert "port is 70000" in refused("--port", "70000")
    assert "can't listen on 192.0.2.1" in refused("--host", "192.0.2.1", "--assets", str(fake_libraries))
