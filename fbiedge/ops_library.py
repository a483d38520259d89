"""The op library (runtime_ops, C++) as seen from Python: where it is, which kernel runs, and its C API through ctypes.

The runtime registers the file with ONNX Runtime (`SessionOptions.register_custom_ops_library`); the functions here don't
need ONNX Runtime at all. `matmul` and `pack` exist for tests and for checking exports: they copy, and use one thread.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .bits import TILE_BYTES, TILE_INPUTS, TILE_ROWS
from .errors import OpLibraryError

ACCURACY_LEVELS = {"fp32": 1, "int8": 4}  # numbered as in ONNX Runtime's MatMulNBits
SCALE_FORMS = {"column": 0, "row": 1, "single": 2, "block": 3}


def library_path() -> Path:
    """The op library's file: FBIEDGE_OPS_LIBRARY if set, else the packaged one. Raises OpLibraryError when missing."""
    override = os.environ.get("FBIEDGE_OPS_LIBRARY")
    if override:
        path = Path(override)
        hint = "unset FBIEDGE_OPS_LIBRARY or point it at the library's file"
    else:
        names = {"win32": "fbiedge_ops.dll", "darwin": "libfbiedge_ops.dylib"}
        path = Path(str(files("fbiedge") / "lib" / names.get(sys.platform, "libfbiedge_ops.so")))
        hint = "reinstall fbiedge (a C++17 compiler is needed to build it)"
    if not path.is_file():
        raise OpLibraryError(f"no op library at {path}; {hint}")
    return path


def include_path() -> Path:
    """The folder of the packaged library's C headers. Raises OpLibraryError when they are missing."""
    header = Path(str(files("fbiedge") / "include" / "fbiedge_ops.h"))
    if not header.is_file():
        raise OpLibraryError(f"no header at {header}; reinstall fbiedge")
    return header.parent


def version() -> str:
    """Version of the op library. Raises OpLibraryError when it can't be loaded."""
    return str(_load().fbiedge_version().decode())


def available_isas() -> list[str]:
    """Kernels that this machine can run, best first; the last is `scalar`."""
    library = _load()
    return [library.fbiedge_isa_name(i).decode() for i in range(library.fbiedge_isa_count())]


def active_isa() -> str:
    """The kernel in use: FBIEDGE_ISA's if set, else the best. Raises OpLibraryError when it can't run here."""
    name = _load().fbiedge_active_isa()
    if name is None:
        raise OpLibraryError(
            f"FBIEDGE_ISA is {os.environ.get('FBIEDGE_ISA')!r}, expected one that runs here: {', '.join(available_isas())}"
        )
    return str(name.decode())


def pack(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Signs of `weight` [N, K] -> tiles [ceil(N/16), ceil(K/32), 64], by the library (fbiedge.bits does the same)."""
    weight = np.ascontiguousarray(weight, np.float32)
    n, k = weight.shape
    tiles = np.empty((-(-n // TILE_ROWS), -(-k // TILE_INPUTS), TILE_BYTES), np.uint8)
    _check(_load().fbiedge_pack(weight.ctypes.data, n, k, tiles.ctypes.data, tiles.nbytes))
    return tiles


def matmul(
    a: npt.NDArray[np.float32],
    tiles: npt.NDArray[np.uint8],
    scales: npt.NDArray[Any],
    offsets: npt.NDArray[np.float32] | None = None,
    bias: npt.NDArray[np.float32] | None = None,
    *,
    n: int,
    scale_form: str,
    accuracy_level: str = "int8",
    isa: str | None = None,
) -> npt.NDArray[np.float32]:
    """BinaryMatMul on one thread: a [M, K] -> [M, n]. Shapes and forms as in runtime_ops/SPECIFICATION.md.

    `isa` names a kernel; None takes the active one. Raises OpLibraryError where a size or name doesn't fit.
    """
    m, k = a.shape
    groups = -(-k // 128)
    if scale_form not in SCALE_FORMS or accuracy_level not in ACCURACY_LEVELS:
        raise OpLibraryError(
            f"scale_form {scale_form!r} or accuracy_level {accuracy_level!r} is unknown, expected one of "
            f"{', '.join(SCALE_FORMS)} and one of {', '.join(ACCURACY_LEVELS)}"
        )
    n_tiles = -(-n // TILE_ROWS)
    shapes = {"column": (k,), "row": (n,), "single": (1,), "block": (n_tiles, groups, TILE_ROWS)}
    fp16 = scale_form == "block" and scales.dtype == np.float16
    a = np.ascontiguousarray(a, np.float32)
    tiles = _shaped("tiles", tiles, np.uint8, (n_tiles, -(-k // TILE_INPUTS), TILE_BYTES))
    scales = _shaped("scales", scales, np.float16 if fp16 else np.float32, shapes[scale_form])
    offsets = None if offsets is None else _shaped("offsets", offsets, np.float32, shapes[scale_form])
    bias = None if bias is None else _shaped("bias", bias, np.float32, (n,))
    y = np.empty((m, n), np.float32)
    args = _MatMulArgs(
        struct_bytes=ctypes.sizeof(_MatMulArgs),
        isa=None if isa is None else isa.encode(),
        accuracy_level=ACCURACY_LEVELS[accuracy_level],
        scale_form=SCALE_FORMS[scale_form],
        scales_are_fp16=fp16,
        m=m,
        n=n,
        k=k,
        a=a.ctypes.data,
        b=tiles.ctypes.data,
        scales=scales.ctypes.data,
        offsets=None if offsets is None else offsets.ctypes.data,
        bias=None if bias is None else bias.ctypes.data,
        y=y.ctypes.data,
    )
    _check(_load().fbiedge_matmul(ctypes.byref(args)))
    return y


class _MatMulArgs(ctypes.Structure):
    """fbiedge_matmul_args of fbiedge_ops.h."""

    _fields_ = [
        ("struct_bytes", ctypes.c_size_t),
        ("isa", ctypes.c_char_p),
        ("accuracy_level", ctypes.c_int),
        ("scale_form", ctypes.c_int),
        ("scales_are_fp16", ctypes.c_int),
        ("m", ctypes.c_size_t),
        ("n", ctypes.c_size_t),
        ("k", ctypes.c_size_t),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]


def _shaped(name: str, array: npt.NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if array.shape != shape:
        raise OpLibraryError(f"{name} has shape {array.shape}, expected {shape}")
    return np.ascontiguousarray(array, dtype)


def _check(status: int) -> None:
    if status:
        raise OpLibraryError(f"op library: {_load().fbiedge_status_message(status).decode()}")


def _load() -> ctypes.CDLL:
    return _load_file(library_path())


@cache
def _load_file(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.fbiedge_version.restype = ctypes.c_char_p
        library.fbiedge_status_message.argtypes = [ctypes.c_int]
        library.fbiedge_status_message.restype = ctypes.c_char_p
        library.fbiedge_isa_name.argtypes = [ctypes.c_int]
        library.fbiedge_isa_name.restype = ctypes.c_char_p
        library.fbiedge_active_isa.restype = ctypes.c_char_p
        library.fbiedge_pack.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t,
        ]  # fmt: skip
        library.fbiedge_matmul.argtypes = [ctypes.POINTER(_MatMulArgs)]
    except (OSError, AttributeError) as error:
        raise OpLibraryError(f"can't load the op library {path}: {error}; rebuild or reinstall fbiedge") from error
    return library
