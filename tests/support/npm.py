"""npm packages that tests need, installed once into the git-ignored build folder; and whether there is npm at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "build"


def require(*programs: str) -> None:
    """Skip the test where one of `programs` is absent; with FBIEDGE_REQUIRE_BROWSER=1, fail."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        unavailable(f"there is no {' or '.join(missing)}")


def unavailable(reason: str) -> None:
    """As `require`, for whatever else a test lacks."""
    assert os.environ.get("FBIEDGE_REQUIRE_BROWSER") != "1", f"FBIEDGE_REQUIRE_BROWSER=1, but {reason}"
    pytest.skip(reason)


def installed(source: Path) -> Path:
    """A copy of the folder `source`, whose package-lock.json is installed beside its other files."""
    require("node", "npm")
    files = sorted(path for path in source.iterdir() if path.is_file())
    digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()
    target = BUILD / f"{source.name}-{digest[:12]}"
    if (target / "complete").exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in files:
        shutil.copy(path, target)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=target, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        unavailable(f"npm can't bring {source.name}: {done.stderr}")
    (target / "complete").touch()
    return target
