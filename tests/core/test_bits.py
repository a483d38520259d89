"""The one convention for bits: exact bytes, and round trips at sizes around the byte, the word and the tile."""

from __future__ import annotations

import numpy as np
import pytest

from fbiedge.bits import SIGNS_OF_BYTE, TILE_BYTES, pack_bits, tile_bits, unpack_bits, untile_bits

SIZES = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 172]


def random_signs(n: int, k: int) -> np.ndarray:
    return np.random.default_rng(n * 1000 + k).choice(np.array([-1.0, 1.0], np.float32), (n, k))


def test_exact_bytes() -> None:
    """Bit 1 is +1, least significant first, sign(0) = sign(-0) = +1, padding bits 0."""
    weight = np.array([[1, -1, 1, 1, -1, -1, -1, -1, 3.5], [0.0, -0.0, -2, -1e-30, 1e-30, -1, -1, 1, -1]], np.float32)
    assert pack_bits(weight).tolist() == [[0b00001101, 0b1], [0b10010011, 0b0]]


def test_signs_of_every_byte() -> None:
    bytes_ = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(SIGNS_OF_BYTE, unpack_bits(bytes_[:, None], 8))
    assert SIGNS_OF_BYTE.dtype == np.float32


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("n", [1, 3])
def test_pack_round_trip(n: int, k: int) -> None:
    signs = random_signs(n, k)
    packed = pack_bits(signs)
    assert packed.shape == (n, -(-k // 8)) and packed.dtype == np.uint8
    unpacked = unpack_bits(packed, k)
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, signs)
    if k % 8:
        assert not (packed[:, -1] >> (k % 8)).any(), "padding bits must be 0"


def test_exact_tile() -> None:
    """Byte 4·r + j, bit b of tile (n // 16, k // 32) is row r and input 8·j + b."""
    n, k = 18, 45
    for row, column in [(0, 0), (0, 8), (1, 0), (15, 31), (16, 0), (17, 44), (3, 32)]:
        weight = np.full((n, k), -1.0, np.float32)
        weight[row, column] = 1.0
        tiles = tile_bits(pack_bits(weight))
        assert tiles.shape == (2, 2, TILE_BYTES)
        expected = np.zeros((2, 2, 64), np.uint8)
        expected[row // 16, column // 32, 4 * (row % 16) + column % 32 // 8] = 1 << (column % 8)
        np.testing.assert_array_equal(tiles, expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", SIZES)
def test_tile_round_trip(n: int, k: int) -> None:
    packed = pack_bits(random_signs(n, k))
    tiles = tile_bits(packed)
    assert tiles.shape == (-(-n // 16), -(-k // 32), 64) and tiles.dtype == np.uint8
    assert tiles.flags.c_contiguous
    np.testing.assert_array_equal(untile_bits(tiles, n, k), packed)
    assert int(np.bitwise_count(tiles).sum() if hasattr(np, "bitwise_count") else np.unpackbits(tiles).sum()) == int(
        np.unpackbits(packed).sum()
    ), "padding must be 0 bits"
