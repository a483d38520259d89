"""The int8 head, in the form of ORT's MatMulNBits with 8 bits: w ≈ (code - 128) · scale, one scale per 32 inputs.

ONNX Runtime takes 8 bits from 1.22 on; for an older one export the head as fp32.
Symmetric: scale = max|w| / 127 of the block, so that 0 stays 0 and no zero points are stored. 9 bits a weight in all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BLOCK = 32
ZERO_POINT = 128  # what MatMulNBits assumes for 8 bits when no zero points are given
_ROWS_AT_ONCE = 2048  # keeps the float temporaries small beside the head itself


def quantize_head(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Head [N, K] -> codes uint8 [N, ceil(K/32), 32] and scales float32 [N · ceil(K/32)]; padding codes are 128."""
    n, k = weight.shape
    blocks = -(-k // BLOCK)
    codes = np.empty((n, blocks, BLOCK), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = weight[start : start + _ROWS_AT_ONCE]
        padded = np.zeros((len(rows), blocks * BLOCK), np.float32)
        padded[:, :k] = rows
        grouped = padded.reshape(len(rows), blocks, BLOCK)
        scale = np.abs(grouped).max(axis=-1) / np.float32(127)
        safe = np.where(scale > 0, scale, np.float32(1))
        codes[start : start + len(rows)] = np.rint(grouped / safe[..., None]) + ZERO_POINT
        scales[start : start + len(rows)] = scale
    return codes, scales.reshape(-1)


def dequantize_head(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.float32]:
    """Codes [N, ceil(K/32), 32] and scales [N · ceil(K/32)] -> the head [N, K] as the model computes it."""
    n, blocks, _ = codes.shape
    head = codes.astype(np.float32)
    head -= ZERO_POINT
    head *= scales.reshape(n, blocks, 1)
    return np.ascontiguousarray(head.reshape(n, blocks * BLOCK)[:, :k])
