"""Our declaration of ONNX Runtime's C ABI against the official header, where one is installed (Debian: libonnxruntime-dev).

ONNXRUNTIME_INCLUDE_DIR names the folder of another one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.native import SOURCE, call, tool

FOLDERS = (os.environ.get("ONNXRUNTIME_INCLUDE_DIR", ""), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime")
# What compiles with either; with the official header also types of functions are compared, not positions alone.
PROGRAMS = sorted([*SOURCE.glob("src/ort/*.cc"), *SOURCE.glob("examples/*.cc")])


@pytest.fixture(scope="module")
def official() -> str:
    for folder in FOLDERS:
        if folder and (Path(folder) / "onnxruntime_c_api.h").is_file():
            return folder
    pytest.skip("no official onnxruntime_c_api.h (Debian 13: apt-get install libonnxruntime-dev)")


def test_everything_compiles_with_the_official_header(official: str) -> None:
    """abi_check.cc holds the positions, sizes and values against each other."""
    folders = [f"-I{SOURCE}/include", f"-I{SOURCE}/src", "-isystem", official]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-DFBIEDGE_OFFICIAL_ORT_HEADER"]
    call(tool("g++"), *options, *folders, *PROGRAMS)


def test_the_check_sees_a_wrong_position(official: str, tmp_path: Path) -> None:
    header = (SOURCE / "src/ort/abi/onnxruntime_c_api.h").read_text()
    wrong = header.replace("void* slots_4_to_6[3];", "void* slots_4_to_6[2];")
    assert wrong != header
    (tmp_path / "abi").mkdir()
    (tmp_path / "abi/onnxruntime_c_api.h").write_text(wrong)
    for name in ("abi.h", "abi_check.cc"):
        (tmp_path / name).write_text((SOURCE / "src/ort" / name).read_text())
    command = [tool("g++"), "-std=c++17", "-fsyntax-only", "-isystem", official, tmp_path / "abi_check.cc"]
    with pytest.raises(AssertionError, match="static assertion failed: OrtApi: "):
        call(*command)
