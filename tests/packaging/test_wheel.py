"""The wheel a user installs: one for every Python 3 of the platform, with library, model and all parts inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out),
               "--config-settings", f"build-dir={out / 'build'}", str(ROOT)]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_it_needs_no_particular_python(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name


def test_it_holds_every_part_and_nothing_else_at_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fbiedge", next(top for top in tops if top.endswith(".dist-info"))}
    parts = ("training/trainer.py", "exporters/onnx/graph.py", "models/default.onnx", "include/fbiedge_ops.h")
    for needed in (f"fbiedge/{part}" for part in parts):
        assert needed in names
    assert [name for name in names if name.startswith("fbiedge/lib/") and "fbiedge_ops" in name]
    assert not [name for name in names if name.endswith((".pyc", ".cc", ".pt"))]


def test_it_chats_when_installed_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # The environment's own fbiedge is an editable install, found through a .pth file; -S leaves those unread.
    site = [entry for entry in sys.path if entry.endswith("site-packages")]
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, *{site!r}]; import fbiedge, fbiedge.cli as cli; "
        f"assert fbiedge.__file__.startswith({str(tmp_path)!r}), fbiedge.__file__; "
        "code = cli.run(['generate', '-p', 'Once upon a time', '--max-tokens', '8', '--temperature', '0']); "
        "code = code or cli.run(['library', '--include']); "
        "heavy = {'torch', 'onnx', 'transformers', 'safetensors'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FBIEDGE", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text, include = done.stdout.rstrip().rsplit("\n", 1)
    assert len(text.split()) >= 4, text
    assert Path(include) == tmp_path / "fbiedge" / "include"
