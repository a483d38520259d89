"""ggml's blocks -> numbers: the types of which files with 1-bit layers are made.

A row is a sequence of blocks. d is a float16, q an integer, and every product is rounded to float32 as ggml does it:

    Q1_0   128 weights: d, 128 bits                     w = d or -d
    Q4_0    32 weights: d, 16 bytes                     w = d·(q - 8)      byte i: weight i low, weight 16 + i high
    Q8_0    32 weights: d, 32 int8                      w = d·q
    Q6_K   256 weights: 128 + 64 bytes, 16 int8 s, d    w = d·s·(q - 32)   two halves of 128, see `_q6_k`
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .errors import ModelFileError
from .gguf_file import GGML_TYPES, GgufTensor

Blocks = npt.NDArray[np.uint8]  # [blocks, bytes of a block]
Floats = npt.NDArray[np.float32]

_Q1_0_BYTES = 2 + 128 // 8
_WEIGHTS_AT_ONCE = 1 << 20  # keeps temporaries small beside the tensor itself


def dequantize(tensor: GgufTensor, raw: npt.NDArray[np.uint8]) -> Floats:
    """The bytes `raw` of `tensor` as float32 in its shape. Raises ModelFileError for a type that isn't read."""
    require_readable(tensor)
    decode = _DECODERS[tensor.ggml_type]
    block_weights, block_bytes = _SIZES[tensor.ggml_type]
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty((len(blocks), block_weights), np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // block_weights)
    for start in range(0, len(blocks), step):
        out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(tensor.shape)


def require_readable(tensor: GgufTensor) -> None:
    """Raise ModelFileError for a type that `dequantize` doesn't read."""
    if tensor.ggml_type not in _DECODERS:
        raise ModelFileError(
            f"the tensor {tensor.name} has type {tensor.ggml_type}, expected one of {', '.join(_DECODERS)}"
        )


def q1_0_bits(tensor: GgufTensor, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The sign bits of a Q1_0 tensor [N, K] in plain packing [N, K/8], see fbiedge.bits: nothing is unpacked."""
    n, k = tensor.shape
    return np.ascontiguousarray(raw.reshape(n, -1, _Q1_0_BYTES)[..., 2:]).reshape(n, k // 8)


def q1_0_scales(tensor: GgufTensor, raw: npt.NDArray[np.uint8]) -> Floats:
    """The scales d of a Q1_0 tensor [N, K], one for 128 inputs of a row: [N, K/128]."""
    return _halves(raw.reshape(tensor.shape[0], -1, _Q1_0_BYTES))[..., 0]


def _halves(blocks: npt.NDArray[np.uint8], start: int = 0) -> Floats:
    """The float16 at byte `start` of each block, as float32 [..., 1]."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2").astype(np.float32)


def _q1_0(blocks: Blocks) -> Floats:
    d = _halves(blocks)
    return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), d, -d)


def _q4_0(blocks: Blocks) -> Floats:
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return _halves(blocks) * (codes.astype(np.float32) - 8)


def _q8_0(blocks: Blocks) -> Floats:
    weights: Floats = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
    weights *= _halves(blocks)
    return weights


def _q6_k(blocks: Blocks) -> Floats:
    """Weight 32·g + i of a half has its low bits in byte 32·(g mod 2) + i of 64, low nibble for g < 2, its high ones
    in byte i of 32, at 2·g, and the scale 2·g + i // 16 of 8."""
    halves = (len(blocks), 2)
    low = blocks[:, :128].reshape(*halves, 64)
    high = blocks[:, 128:192].reshape(*halves, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = np.concatenate([low & 15, low >> 4], axis=2).reshape(*halves, 4, 32) | high << 4
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    scales *= _halves(blocks, 208)
    weights: Floats = (codes.astype(np.float32) - 32).reshape(-1, 16, 16)
    weights *= scales[..., None]
    return weights.reshape(-1, 256)


def _bf16(blocks: Blocks) -> Floats:
    upper_halves = np.ascontiguousarray(blocks).view("<u2").astype(np.uint32)
    return np.asarray(upper_halves << 16, np.uint32).view(np.float32)


_SIZES = {name: (weights, size) for name, weights, size in GGML_TYPES.values()}
_DECODERS: dict[str, Callable[[Blocks], Floats]] = {
    "F32": lambda blocks: np.ascontiguousarray(blocks).view("<f4"),
    "F16": _halves,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q6_K": _q6_k,
    "Q1_0": _q1_0,
}
