"""Wheels for the systems that people have, cross-compiled on any of them: python runtime_ops/packaging/build_wheels.py

The compiler is the clang inside zig (`pip install ziglang`), which carries every system's C and C++ libraries; C++'s is
linked in, so a wheel's library needs nothing but what the system itself brings. The first build for a platform takes
minutes, in which zig makes that platform's C++ library for all later ones.

There is one wheel a platform, for every Python 3: the library doesn't know Python. Its tag is a promise (the oldest glibc,
the oldest macOS), and tests/packaging/test_wheels.py reads from the built library that it is kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Platform:
    """`target` is zig's name of it, `tags` what pip knows it by."""

    target: str
    tags: tuple[str, ...]
    library: str


# The glibc of 2012: older than any that ONNX Runtime still runs on (2.28 for 1.31). Apple silicon began with macOS 11.
PLATFORMS = {
    "linux-x86_64": Platform(
        "x86_64-linux-gnu.2.17", ("manylinux2014_x86_64", "manylinux_2_17_x86_64"), "libfbiedge_ops.so"
    ),
    "linux-aarch64": Platform(
        "aarch64-linux-gnu.2.17", ("manylinux2014_aarch64", "manylinux_2_17_aarch64"), "libfbiedge_ops.so"
    ),
    "macos-arm64": Platform("aarch64-macos.11.0", ("macosx_11_0_arm64",), "libfbiedge_ops.dylib"),
    "windows-x86_64": Platform("x86_64-windows-gnu", ("win_amd64",), "fbiedge_ops.dll"),
}


def build_wheel(name: str, out: Path, builds: Path) -> Path:
    """The wheel of a platform in `out`; object files stay in `builds` for the next time. CalledProcessError if it fails."""
    platform = PLATFORMS[name]
    settings = {
        "build-dir": builds / name,
        "wheel.tags": ";".join(f"py3-none-{tag}" for tag in platform.tags),
        "cmake.define.CMAKE_TOOLCHAIN_FILE": ROOT / "runtime_ops/cmake/zig.cmake",
        "cmake.define.FBIEDGE_ZIG": zig(),
        "cmake.define.FBIEDGE_ZIG_TARGET": platform.target,
        "wheel.exclude": "fbiedge/lib/*.a",  # what programs of Windows link to
        "install.strip": "false",  # by a program of this system, which doesn't know the others' files; nothing is left to strip
    }
    partial = out / f"{name}.partial"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-build-isolation", "--wheel-dir", str(partial),
               *(f"--config-settings={key}={value}" for key, value in settings.items()), str(ROOT)]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        (wheel,) = partial.glob("*.whl")
        return wheel.replace(out / wheel.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def zig() -> Path:
    """zig's program, in its Python package."""
    try:
        import ziglang  # type: ignore[import-untyped]
    except ImportError:
        raise SystemExit("error: zig is missing: pip install ziglang") from None
    return Path(ziglang.__file__).parent / ("zig.exe" if os.name == "nt" else "zig")


def main(
    platforms: Annotated[list[str] | None, typer.Argument(help=f"Of: {', '.join(PLATFORMS)}. All, if none.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the wheels.")] = ROOT / "dist",
) -> None:
    """Build wheels, two at a time."""
    names = platforms or list(PLATFORMS)
    unknown = sorted(set(names) - set(PLATFORMS))
    if unknown:
        raise SystemExit(f"error: no platform {', '.join(unknown)}, expected some of {', '.join(PLATFORMS)}")
    zig()
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(build_wheel, name, out, ROOT / "build/wheels") for name in names]
        for name, built in zip(names, builds, strict=True):
            try:
                wheel = built.result()
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"error: the wheel for {name} can't be built\n{error.stdout}{error.stderr}") from None
            print(f"{wheel}  {wheel.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    typer.run(main)
