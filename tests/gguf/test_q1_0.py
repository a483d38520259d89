"""Q1_0 blocks: exact bytes, and what ggml's own description makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from support.errors import raises_line

from fbiedge.bits import pack_bits
from fbiedge.errors import CheckpointError
from fbiedge.exporters.gguf.q1_0 import BLOCK_BYTES, q1_0_blocks, quantize_q1_0, row_bytes


def by_the_book(rows: np.ndarray, k: int) -> np.ndarray:
    """Weights [N, K] of blocks, one at a time."""
    weights = np.empty((len(rows), k), np.float32)
    for n, row in enumerate(rows):
        for g in range(k // 128):
            block = row[18 * g : 18 * (g + 1)].tobytes()
            d = np.frombuffer(block[:2], "<f2")[0]
            for i in range(128):
                bit = block[2 + i // 8] >> (i % 8) & 1
                weights[n, 128 * g + i] = d if bit else -d
    return weights


def test_exact_bytes() -> None:
    signs = np.full((1, 128), -1.0, np.float32)
    signs[0, [0, 9, 127]] = 1
    blocks = q1_0_blocks(pack_bits(signs), np.array([[0.5]], np.float32), "x")
    assert blocks.tobytes() == bytes([0x00, 0x38, 0x01, 0x02, *[0] * 13, 0x80])
    assert BLOCK_BYTES == 18 and row_bytes(256) == 36


def test_equals_the_definition() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(0, 1, (5, 384)).astype(np.float32)
    d = generator.normal(0, 1, (5, 3)).astype(np.float32)
    blocks = q1_0_blocks(pack_bits(weight), d, "x")
    assert blocks.shape == (5, 54) and blocks.dtype == np.uint8
    expected = np.where(weight >= 0, 1, -1) * np.repeat(d.astype(np.float16), 128, axis=1)
    assert np.array_equal(by_the_book(blocks, 384), expected)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 2)])
def test_a_scale_may_be_shared(shape: tuple[int, int]) -> None:
    packed = np.random.default_rng(0).integers(0, 256, (4, 32), np.uint8)
    d = np.arange(1, shape[0] * shape[1] + 1, dtype=np.float32).reshape(shape)
    whole = q1_0_blocks(packed, np.broadcast_to(d, (4, 2)).copy(), "x")
    assert np.array_equal(q1_0_blocks(packed, d, "x"), whole)


def test_quantizing_loses_least() -> None:
    """No other d gives a smaller squared error."""
    weight = np.random.default_rng(0).normal(0, 1, (3, 256)).astype(np.float32)
    got = by_the_book(quantize_q1_0(weight, "x"), 256)
    error = np.square(got - weight).sum()
    assert np.array_equal(got >= 0, weight >= 0)
    for factor in (0.97, 1.03):
        assert np.square(got * factor - weight).sum() > error


def test_a_scale_beyond_fp16() -> None:
    with raises_line(CheckpointError, "blk.0.attn_q.weight", "beyond fp16's 65504"):
        q1_0_blocks(np.zeros((1, 16), np.uint8), np.array([[65536.0]], np.float32), "blk.0.attn_q.weight")
