"""How embedding and head are held, and the linears of a full-precision model: the forms, and what each makes of the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import gguf  # noqa: TID253
import numpy as np
import numpy.typing as npt

from fbiedge.errors import UsageError
from fbiedge.gguf_file import GgufTensor
from fbiedge.gguf_tensors import dequantize

from ..onnx.head import quantize_rows
from .q1_0 import half, quantize_q1_0

Storage = Literal["f16", "q8_0", "q1_0", "f32"]

TYPES: dict[Storage, gguf.GGMLQuantizationType] = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q1_0": gguf.GGMLQuantizationType.Q1_0,
}
_ROWS_AT_ONCE = 2048  # of a matrix that is quantised


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """Raises UsageError for a value that isn't one of those listed."""

    embedding: Storage = "f16"
    head: Storage = "f16"  # also of the linears of a full-precision model

    def __post_init__(self) -> None:
        for name in ("embedding", "head"):
            value = getattr(self, name)
            if value not in get_args(Storage):
                raise UsageError(f"{name} is {value!r}, expected one of {', '.join(get_args(Storage))}")


UNROUNDED = GgufOptions(embedding="f32", head="f32")


def stored_row(storage: Storage, k: int) -> tuple[str, int]:
    """Numpy's dtype and the length of a stored row of `k` numbers."""
    if storage in ("f32", "f16"):
        return ("float32" if storage == "f32" else "float16"), k
    block, block_bytes = gguf.GGML_QUANT_SIZES[TYPES[storage]]
    return "uint8", k // block * block_bytes


def stored_form(weight: npt.NDArray[np.float32], storage: Storage, name: str) -> npt.NDArray[Any]:
    """[N, K] as the file holds it, rows as `stored_row` says. Raises CheckpointError, with `name`, beyond fp16."""
    match storage:
        case "f32":
            return weight
        case "f16":
            return half(weight, name)
        case "q1_0":
            return quantize_q1_0(weight, name)
    stored = np.empty((len(weight), stored_row(storage, weight.shape[1])[1]), np.uint8)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        part = np.ascontiguousarray(weight[start : start + _ROWS_AT_ONCE])
        stored[start : start + len(part)] = _q8_0(part, name)
    return stored


def _q8_0(weight: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.uint8]:
    """[N, K] -> blocks of an fp16 scale and 32 codes: the numbers of an int8 embedding or head in ONNX, and in training.

    gguf-py would choose the codes by the scale before it is rounded to fp16, and so not always the nearest.
    """
    rows = quantize_rows(weight, 8, name)
    scales = rows.scales.astype("<f2")[..., None].view(np.uint8)
    return np.concatenate([scales, rows.codes - np.uint8(128)], axis=-1).reshape(len(weight), -1)  # wraps: int8


def as_stored(weight: npt.NDArray[np.float32], storage: Storage, name: str) -> npt.NDArray[np.float32]:
    """[N, K] as it comes back from the file. Raises CheckpointError as `stored_form`."""
    if storage == "f32":
        return weight
    stored = stored_form(weight, storage, name)
    tensor = GgufTensor(name=name, ggml_type=storage.upper(), shape=weight.shape, offset=0, nbytes=stored.nbytes)
    return dequantize(tensor, stored.view(np.uint8).reshape(-1))
