"""The JavaScript libraries of the page, which npm brings into the user's cache folder the first time.

npm/package-lock.json names each package by its version and the hash of its contents. Of what npm unpacks (150 MB) only
the files that the page loads are kept (45 MB), in a folder named after the lock: another lock is another folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import OutputError, UsageError
from ..files import atomic_directory

# What the page loads, by the name that it is served under, in node_modules. Of onnxruntime-web there are two builds:
# one for WebAssembly alone and one, twice as large, that brings WebGPU too.
LIBRARIES = {
    "jinja.js": "@huggingface/jinja/dist/index.js",
    "tokenizers.js": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "ort.wasm.min.mjs": "onnxruntime-web/dist/ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs": "onnxruntime-web/dist/ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
}
_NPM_FILES = Path(__file__).parent / "npm"
_NPM_SECONDS = 900


def cached_folder() -> Path:
    """Where the libraries of this version of the page are kept."""
    lock = (_NPM_FILES / "package-lock.json").read_bytes()
    return _cache_folder() / "fbiedge" / f"web-{hashlib.sha256(lock).hexdigest()[:16]}"


def is_complete(folder: Path) -> bool:
    """Whether all libraries lie in `folder`/node_modules."""
    return all((folder / "node_modules" / path).is_file() for path in LIBRARIES.values())


def library_files(folder: Path) -> dict[str, Path]:
    """The libraries in `folder` by the names they are served under. Raises UsageError where one is missing."""
    files = {name: folder / "node_modules" / path for name, path in LIBRARIES.items()}
    missing = next((path for path in files.values() if not path.is_file()), None)
    if missing is not None:
        raise UsageError(
            f"{missing} does not exist; --assets takes a folder with a node_modules as `fbiedge web` makes it: "
            f"copy {cached_folder()} from a machine where it has run"
        )
    return files


def install(folder: Path) -> None:
    """Have npm bring the libraries into `folder`. Raises UsageError, OutputError; the folder is then as it was."""
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(
            "npm is missing, which brings the page's libraries the first time; install Node.js, or give a folder that "
            "has them with --assets"
        )
    with atomic_directory(folder) as staging:
        work = staging / "npm"
        work.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(_NPM_FILES / name, work / name)
        # No scripts of packages run: the libraries are plain files.
        command = [npm, "ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error"]
        try:
            done = subprocess.run(
                command, cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=_NPM_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise OutputError(f"npm did not bring the page's libraries in {_NPM_SECONDS // 60} minutes") from error
        if done.returncode != 0:
            raise OutputError(f"npm can't bring the page's libraries: {_reason(done.stderr or done.stdout)}")
        for path in LIBRARIES.values():
            target = staging / "node_modules" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / "node_modules" / path, target)
        shutil.rmtree(work)


def _reason(output: str) -> str:
    """npm's own words without its prefix; the line before the last few, which only say where its log is."""
    lines = [line.removeprefix("npm error").strip() for line in output.splitlines()]
    return " ".join(line for line in lines if line and "complete log" not in line)[:300] or "it gave no reason"


def _cache_folder() -> Path:
    """The user's cache folder as each system has it."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return named if named.is_absolute() else Path.home() / ".cache"
