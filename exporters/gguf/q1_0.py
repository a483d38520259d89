"""ggml's Q1_0: 128 weights of one row in 18 bytes, which say  w[i] = d · (bit i ? +1 : -1).

    bytes 0-1    d, float16, little-endian
    bytes 2-17   128 sign bits, least significant first, as in fbiedge.bits

So a row of K inputs is K / 128 such blocks, 1.125 bits a weight, and sign bits go into them without being unpacked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.bits import pack_bits
from fbiedge.config import BLOCK_SIZE
from fbiedge.errors import CheckpointError

BLOCK_BYTES = 2 + BLOCK_SIZE // 8


def row_bytes(k: int) -> int:
    """Bytes of a row of `k` inputs, a multiple of 128."""
    return k // BLOCK_SIZE * BLOCK_BYTES


def q1_0_blocks(packed: npt.NDArray[np.uint8], d: npt.NDArray[np.floating[Any]], name: str) -> npt.NDArray[np.uint8]:
    """Plain sign bits uint8 [N, K/8] and d [N, K/128] (or what broadcasts to it) -> rows of blocks uint8 [N, K/128 · 18].

    Raises CheckpointError, with `name`, for a d beyond fp16.
    """
    n, k_bytes = packed.shape
    groups = k_bytes * 8 // BLOCK_SIZE
    blocks = np.empty((n, groups, BLOCK_BYTES), np.uint8)
    scales = np.ascontiguousarray(np.broadcast_to(half(d, name), (n, groups)), "<f2")
    blocks[..., :2] = scales.view(np.uint8).reshape(n, groups, 2)
    blocks[..., 2:] = packed.reshape(n, groups, BLOCK_SIZE // 8)
    return blocks.reshape(n, -1)


def quantize_q1_0(weight: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.uint8]:
    """A full-precision table [N, K] -> blocks: signs, and the d of least squared error, which is the mean of |w|."""
    n, k = weight.shape
    d = np.abs(weight).reshape(n, k // BLOCK_SIZE, BLOCK_SIZE).mean(axis=-1)
    return q1_0_blocks(pack_bits(weight), d, name)


def half(values: npt.NDArray[np.floating[Any]], name: str) -> npt.NDArray[np.float16]:
    """As float16. Raises CheckpointError for values that it can't hold."""
    # Not by np.abs, which would copy an embedding of half a gigabyte.
    if max(values.max(initial=0), -values.min(initial=0)) > np.finfo(np.float16).max:
        raise CheckpointError(f"{name} holds values beyond fp16's 65504, which GGUF can't store in this form")
    return values.astype(np.float16)
