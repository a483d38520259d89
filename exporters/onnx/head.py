"""Head and embedding, quantised: w ≈ (code - z) · scale with z = 2^(bits-1), one fp16 scale per row and block of 32 inputs.

8 bits: scale = max|w| / 127, so that 0 stays 0. 4 bits: of a few scales near max|w| / 8, of the sign that lets the
largest weight have code 0, the one with the least squared error. The scale is rounded to fp16 before any code is chosen.

    tiles   for fbiedge.MatMulNBits (runtime_ops/spec/MatMulNBits.md): 8.5 or 4.5 bits a weight, read as they lie
    stock   for com.microsoft.MatMulNBits: codes and float32 scales, 9 or 5 bits; 8 bits need ONNX Runtime 1.22
    packed  for an embedding, looked up row by row (embedding.py): codes and fp16 scales, 8.5 or 4.5 bits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fbiedge.bits import TILE_ROWS, unpack_bits
from fbiedge.config import BLOCK_SIZE
from fbiedge.errors import CheckpointError
from fbiedge.weights import BinaryLinear

BLOCK = 32
GROUP = 128  # inputs of a tile group
SCALE_BYTES = TILE_ROWS * GROUP // BLOCK * 2  # of a tile group
_ROWS_AT_ONCE = 2048  # keeps the float temporaries small beside the matrix itself
# Codes that the largest weight is tried on, relative to z: beyond -8 it is clipped, and the others are the finer.
_INT4_EXTREMES = (-8.0, -7.5, -8.25, -8.5, -8.75, -9.0, -9.5)
_SMALLEST_EXTREMES = {8: 127.0, 4: 7.5}


@dataclass(frozen=True, kw_only=True)
class QuantizedRows:
    """Codes uint8 [N, ceil(K/32), 32], one a byte, and scales float16 [N, ceil(K/32)]; padding weights are 0."""

    bits: int  # 4 or 8
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]

    def dequantize(self, k: int) -> npt.NDArray[np.float32]:
        """The matrix [N, K] as the model computes it."""
        head = self.codes.astype(np.float32)
        head -= 1 << (self.bits - 1)
        head *= self.scales.astype(np.float32)[..., None]
        return np.ascontiguousarray(head.reshape(len(head), -1)[:, :k])

    def stock(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """What com.microsoft.MatMulNBits takes: codes uint8 [N, ceil(K/32), 4 · bits] and scales [N · ceil(K/32)]."""
        return self.packed(), self.scales.astype(np.float32).reshape(-1)

    def tiles(self) -> npt.NDArray[np.uint8]:
        """What fbiedge.MatMulNBits takes: uint8 [ceil(N/16), ceil(K/128), 128 + 256 · bits]."""
        n, blocks, _ = self.codes.shape
        n_tiles, groups = -(-n // TILE_ROWS), -(-blocks * BLOCK // GROUP)
        in_group = GROUP // BLOCK
        packed = np.zeros((n_tiles * TILE_ROWS, groups * in_group, 4 * self.bits), np.uint8)
        packed[:n, :blocks] = self.packed()
        scales = np.zeros((n_tiles * TILE_ROWS, groups * in_group), "<f2")
        scales[:n, :blocks] = self.scales
        tiles = np.empty((n_tiles, groups, tile_group_bytes(self.bits)), np.uint8)
        by_block = scales.reshape(n_tiles, TILE_ROWS, groups, in_group).transpose(0, 2, 3, 1)
        tiles[..., :SCALE_BYTES] = np.ascontiguousarray(by_block).view(np.uint8).reshape(n_tiles, groups, -1)
        by_piece = packed.reshape(n_tiles, TILE_ROWS, groups, -1, 4).transpose(0, 2, 3, 1, 4)
        tiles[..., SCALE_BYTES:] = by_piece.reshape(n_tiles, groups, -1)
        return tiles

    def packed(self) -> npt.NDArray[np.uint8]:
        """Codes uint8 [N, ceil(K/32), 4 · bits]; of 4 bits two a byte, the first in the low half."""
        if self.bits == 8:
            return self.codes
        return np.asarray(self.codes[..., 0::2] | self.codes[..., 1::2] << 4, np.uint8)


@runtime_checkable
class HasQuantizedRows(Protocol):
    """Weights whose head or embedding is quantised already, and needn't be a second time."""

    def quantized_head(self, bits: int) -> QuantizedRows | None:
        """The head where it is stored with `bits` bits and fp16 scales."""
        ...

    def quantized_embedding(self, bits: int) -> QuantizedRows | None:
        """The embedding, likewise."""
        ...


def tile_group_bytes(bits: int) -> int:
    """Bytes of 16 rows x 128 inputs: scales and codes."""
    return SCALE_BYTES + TILE_ROWS * GROUP * bits // 8


def rows_from_stock(packed: npt.NDArray[np.uint8], scales: npt.NDArray[Any], bits: int) -> QuantizedRows | None:
    """The inverse of `stock`, and of `packed` with its scales; None where a scale is no fp16 number (heads written before there were tiles)."""
    halves = scales.astype(np.float16).reshape(packed.shape[:2])
    if not np.array_equal(halves.astype(np.float32).reshape(-1), scales.reshape(-1)):
        return None
    return QuantizedRows(bits=bits, codes=_unpacked(packed, bits), scales=halves)


def rows_from_tiles(tiles: npt.NDArray[np.uint8], bits: int, n: int, k: int) -> QuantizedRows:
    """The inverse of `tiles`."""
    n_tiles, groups, _ = tiles.shape
    blocks = -(-k // BLOCK)
    scales = np.ascontiguousarray(tiles[..., :SCALE_BYTES]).view("<f2")
    by_row = scales.reshape(n_tiles, groups, -1, TILE_ROWS).transpose(0, 3, 1, 2).reshape(n_tiles * TILE_ROWS, -1)
    packed = tiles[..., SCALE_BYTES:].reshape(n_tiles, groups, -1, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)
    packed = packed.reshape(n_tiles * TILE_ROWS, -1, 4 * bits)[:n, :blocks]
    return QuantizedRows(bits=bits, codes=_unpacked(packed, bits), scales=by_row[:n, :blocks].astype(np.float16))


def dequantize_stock(
    packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], bits: int, k: int
) -> npt.NDArray[np.float32]:
    """Codes and scales of com.microsoft.MatMulNBits -> the matrix [N, K] as the model computes it."""
    codes = _unpacked(packed, bits)
    head = codes.astype(np.float32)
    head -= 1 << (bits - 1)
    head *= scales.reshape(*codes.shape[:2], 1)
    return np.ascontiguousarray(head.reshape(len(head), -1)[:, :k])


def quantize_rows(weight: npt.NDArray[np.float32], bits: int, name: str = "lm_head.weight") -> QuantizedRows:
    """[N, K] -> codes and scales. Raises CheckpointError, with `name`, for weights that fp16 scales can't reach."""
    n, k = weight.shape
    _require_fp16(float(np.abs(weight).max(initial=0)) / _SMALLEST_EXTREMES[bits], name)
    blocks = -(-k // BLOCK)
    codes = np.empty((n, blocks, BLOCK), np.uint8)
    scales = np.empty((n, blocks), np.float16)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = weight[start : start + _ROWS_AT_ONCE]
        padded = np.zeros((len(rows), blocks * BLOCK), np.float32)
        padded[:, :k] = rows
        grouped = padded.reshape(len(rows), blocks, BLOCK)
        quantize = _quantize_8 if bits == 8 else _quantize_4
        codes[start : start + len(rows)], scales[start : start + len(rows)] = quantize(grouped)
    return QuantizedRows(bits=bits, codes=codes, scales=scales)


def rows_from_binary(rows: BinaryLinear, bits: int, name: str = "lm_head.weight") -> QuantizedRows:
    """Rows of 1 bit of form `block` with codes z ± 1: exact, but for scales that aren't fp16 numbers."""
    _require_fp16(float(np.abs(rows.alpha).max(initial=0)), name)
    zero, blocks = 1 << (bits - 1), -(-rows.k // BLOCK)
    codes = np.full((rows.n, blocks * BLOCK), zero, np.uint8)
    for start in range(0, rows.n, _ROWS_AT_ONCE):
        signs = unpack_bits(rows.packed[start : start + _ROWS_AT_ONCE], rows.k)
        codes[start : start + len(signs), : rows.k] += signs.view(np.uint8)  # wraps: + 255 is - 1
    half, _ = _half(np.repeat(rows.alpha, BLOCK_SIZE // BLOCK, axis=1)[:, :blocks])
    return QuantizedRows(bits=bits, codes=codes.reshape(rows.n, blocks, BLOCK), scales=half)


def _unpacked(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return np.ascontiguousarray(packed)
    codes = np.empty((*packed.shape[:2], BLOCK), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = packed & 15, packed >> 4
    return codes


def _require_fp16(scale: float, name: str) -> None:
    if scale > float(np.finfo(np.float16).max):
        raise CheckpointError(f"{name} is too large for fp16 scales; choose fp32 for it (f32 in GGUF)")


def _half(scale: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Scales in fp16, and what to divide by: 1 where they are 0."""
    half = scale.astype(np.float16)
    divisor = half.astype(np.float32)
    return half, np.where(divisor == 0, np.float32(1), divisor)


def _quantize_8(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """Blocks [n, b, 32] -> codes and scales [n, b]."""
    half, divisor = _half(np.abs(weight).max(axis=-1) / np.float32(127))
    codes = np.clip(np.rint(weight / divisor[..., None]), -127, 127) * (half != 0)[..., None]
    return (codes + 128).astype(np.uint8), half


def _quantize_4(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """Blocks [n, b, 32] -> codes and scales [n, b], by search."""
    largest = np.take_along_axis(weight, np.abs(weight).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    best_error = np.full(largest.shape, np.inf, np.float32)
    best_codes, best_scales = np.zeros(weight.shape, np.int8), np.zeros(largest.shape, np.float16)
    for extreme in _INT4_EXTREMES:
        half, divisor = _half(largest / np.float32(extreme))
        codes = np.rint(weight / divisor[..., None])
        np.clip(codes, -8, 7, out=codes)
        codes *= (half != 0)[..., None]
        difference = codes * half.astype(np.float32)[..., None] - weight
        error = _sum(np.square(difference, out=difference))
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scales = np.where(better, half, best_scales)
        best_codes = np.where(better[..., None], codes.astype(np.int8), best_codes)
    return (best_codes + 8).astype(np.uint8), best_scales


def _sum(blocks: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[n, b, 32] -> [n, b], half onto half: an order that training/quantized_head.py repeats, so that scales agree."""
    while (width := blocks.shape[-1] // 2) > 0:
        blocks = blocks[..., :width] + blocks[..., width:]
    return blocks[..., 0]
