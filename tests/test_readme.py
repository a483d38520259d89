"""Every ```console example of the README is run, in order, in one folder; its printed output must be the real one.

A line `...` in an expected output stands for any lines; `...` within a line stands for any characters.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.bundled import MODEL
from support.server import RunningServer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def examples() -> list[tuple[str, str]]:
    """(command, expected output) of each `$ command` in the README's console blocks."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = entry.partition("\n")
            found.append((command, output))
    return found


def as_pattern(expected: str) -> str:
    lines = [
        r"(?:.*\n)*?" if line.strip() == "..." else ".*?".join(map(re.escape, line.split("..."))) + r"[ \t]*\n"
        for line in expected.rstrip().splitlines()
    ]
    return "".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    sentences = [
        f"The {a} saw the {b} by the {p}.\n"
        for a in ("cat", "dog", "owl")
        for b in ("hen", "fox")
        for p in ("barn", "lake")
    ]
    (path / "stories.txt").write_text("<|endoftext|>\n".join(sentences * 80), encoding="utf-8")
    (path / "runtime_ops").symlink_to(ROOT / "runtime_ops")  # what is said of a checkout
    return path


def test_the_readme_has_examples() -> None:
    assert len(examples()) >= 5


@pytest.mark.parametrize(("command", "expected"), examples(), ids=[c[:50] for c, _ in examples()])
def test_example(command: str, expected: str, folder: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, text=True, timeout=1200, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    output = "".join(f"{line.rstrip()}\n" for line in done.stdout.rstrip().splitlines())
    assert re.fullmatch(as_pattern(expected), output), f"$ {shlex.join([command])}\n{output}"


def test_the_example_of_a_client() -> None:
    """The Python example prints what its comment says, from the server that the page says to start."""
    (program,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    with RunningServer(MODEL) as server:
        program = program.replace("http://127.0.0.1:8080", server.url)
        done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=300, check=False)
    assert done.stdout == program.rpartition("# ")[2], done.stderr


def test_the_file_tree_names_every_file() -> None:
    """The README ends in a tree; a file or folder it does not name, or names in vain, fails here."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: what belongs to the project can't be told")
    tree = README.rpartition("```text\n")[2].partition("```")[0]
    named, folders = set(), []
    for line in tree.splitlines():
        match = re.match(r"^((?:    )*)([\w.\-/]+)", line)
        if not match:
            continue
        depth, name = len(match[1]) // 4, match[2]
        folders[depth:] = [name.rstrip("/")] if name.endswith("/") else []
        named.add("/".join(folders if name.endswith("/") else [*folders[:depth], name]))
    files = set(tracked.stdout.split())
    missing = {f for f in files if f not in named}
    vain = {n for n in named if not (ROOT / n).exists()}
    assert not missing and not vain, f"not in the tree: {sorted(missing)}; in the tree only: {sorted(vain)}"
