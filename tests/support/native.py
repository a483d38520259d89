"""Builds of runtime_ops/ and of programs that use it, as an app would make them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "runtime_ops"
_TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # pip's cmake and ninja


def tool(name: str) -> str:
    """The path of a program that must be there."""
    found = shutil.which(name, path=_TOOLS)
    assert found is not None, f"{name} is missing; install it (pip install cmake ninja)"
    return found


def call(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """What a command prints on stdout, then on stderr; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def build(folder: Path, *options: str, target: str = "all", source: Path = SOURCE) -> Path:
    """`folder`, with `target` of the CMake project in `source` built in it, without a warning."""
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    call(tool("cmake"), "-G", "Ninja", ninja, "-S", source, "-B", folder, *options)
    output = call(tool("cmake"), "--build", folder, "--target", target)
    assert "warning:" not in output, output
    return folder


def onnxruntime_library() -> Path:
    """ONNX Runtime's shared library in its Python package."""
    import onnxruntime

    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.*[0-9]*")
    return library


def install(folder: Path, prefix: Path, *options: str) -> Path:
    """`prefix`, with the op library installed there from a build in `folder`."""
    alone = ("-DFBIEDGE_BUILD_TESTS=OFF", "-DFBIEDGE_BUILD_BENCH=OFF")
    build(folder, *alone, "-DCMAKE_INSTALL_LIBDIR=lib", *options)  # which some systems call lib64
    call(tool("cmake"), "--install", folder, "--prefix", prefix)
    return prefix


def exported_names(library: Path) -> set[str]:
    """What a program can link to of a shared library of Linux."""
    listing = call(tool("nm"), "-D", "--defined-only", library)
    return {line.split()[-1] for line in listing.splitlines()}


def documented_names() -> set[str]:
    """The functions of the C API."""
    header = (SOURCE / "include/fbiedge_ops.h").read_text()
    return set(re.findall(r"FBIEDGE_EXPORT\s[^;]*?(fbiedge_\w+)\(", header))
