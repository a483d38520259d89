"""One convention for sign bits, and the tile layout the kernels read. Nothing else in the project decides either.

    bit 1 = +1, bit 0 = -1; sign(0) = +1; least significant bit first; padding bits are 0.

Plain packing of a sign matrix [N, K]: byte [n, i], bit b <-> input k = 8·i + b. ggml's Q1_0 orders its bits the same way.

Tile packing: tiles of 16 rows x 32 inputs = 64 bytes, stored [ceil(N/16), ceil(K/32), 64].
Byte 4·r + j, bit b of a tile <-> row r, input 8·j + b. So every byte is a byte of the plain packing and only rows are
interleaved: one 512-bit load brings the bits of 16 rows for 32 inputs. Rows pad to 16 and inputs to 32, with 0 bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TILE_ROWS = 16
TILE_INPUTS = 32
TILE_BYTES = TILE_ROWS * TILE_INPUTS // 8
SIGNS_OF_BYTE = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 1, -1).astype(np.float32)  # [256, 8]


def pack_bits(weight: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Sign bits of `weight` [N, K] -> uint8 [N, ceil(K/8)], plain packing."""
    return np.packbits(weight >= 0, axis=-1, bitorder="little")


def unpack_bits(packed: npt.NDArray[np.uint8], k: int) -> npt.NDArray[np.int8]:
    """Plain packing uint8 [N, ceil(K/8)] -> signs int8 [N, K], each +1 or -1."""
    bits = np.unpackbits(packed, axis=-1, count=k, bitorder="little").astype(np.int8)
    return 2 * bits - 1


def tile_bits(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Plain packing uint8 [N, ceil(K/8)] -> tiles uint8 [ceil(N/16), ceil(K/32), 64]."""
    n, k_bytes = packed.shape
    n_tiles, k_tiles = -(-n // TILE_ROWS), -(-k_bytes // 4)
    padded = np.zeros((n_tiles * TILE_ROWS, k_tiles * 4), np.uint8)
    padded[:n, :k_bytes] = packed
    tiles = padded.reshape(n_tiles, TILE_ROWS, k_tiles, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles).reshape(n_tiles, k_tiles, TILE_BYTES)


def untile_bits(tiles: npt.NDArray[np.uint8], n: int, k: int) -> npt.NDArray[np.uint8]:
    """Tiles uint8 [ceil(N/16), ceil(K/32), 64] -> plain packing uint8 [N, ceil(K/8)]."""
    n_tiles, k_tiles, _ = tiles.shape
    rows = tiles.reshape(n_tiles, k_tiles, TILE_ROWS, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(rows.reshape(n_tiles * TILE_ROWS, k_tiles * 4)[:n, : -(-k // 8)])
