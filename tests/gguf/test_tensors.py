"""Dequantisation: to the bit what the gguf package computes, and for Q1_0, which it can't, what the format says."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from support.errors import raises_line
from support.gguf_files import q1_0_blocks

from fbiedge import gguf_tensors
from fbiedge.errors import ModelFileError
from fbiedge.gguf_file import GGML_TYPES, GgufTensor
from fbiedge.gguf_tensors import dequantize, q1_0_bits, q1_0_scales

SIZES = {name: (weights, size) for name, weights, size in GGML_TYPES.values()}


def tensor(ggml_type: str, shape: tuple[int, ...], nbytes: int = 0) -> GgufTensor:
    return GgufTensor(name="x", ggml_type=ggml_type, shape=shape, offset=0, nbytes=nbytes)


def random_blocks(ggml_type: str, rows: int, row_blocks: int, generator: np.random.Generator) -> np.ndarray:
    """Any bytes, with a finite float16 in the place of d."""
    blocks = generator.integers(0, 256, (rows * row_blocks, SIZES[ggml_type][1]), np.uint8)
    d = generator.normal(0, 1, len(blocks)).astype("<f2").view(np.uint8).reshape(-1, 2)
    blocks[:, slice(208, 210) if ggml_type == "Q6_K" else slice(0, 2)] = d
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_0", "Q6_K"])
def test_equals_the_gguf_package(ggml_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tensors, "_WEIGHTS_AT_ONCE", 1000)  # several pieces, the last one not full
    raw = random_blocks(ggml_type, 7, 5, np.random.default_rng(0))
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[ggml_type])
    ours = dequantize(tensor(ggml_type, theirs.shape), raw.reshape(-1))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


def test_floats() -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, 4, 5)).astype(np.float32)
    bf16 = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
    for ggml_type, raw, expected in [
        ("F32", values, values),
        ("F16", values.astype("<f2"), values.astype("<f2").astype(np.float32)),
        ("BF16", bf16, gguf.quants.dequantize(bf16, gguf.GGMLQuantizationType.BF16)),
    ]:
        found = dequantize(tensor(ggml_type, values.shape), raw.view(np.uint8).reshape(-1))
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, values, rtol=2**-8)


def test_q1_0_is_plus_or_minus_d() -> None:
    generator = np.random.default_rng(0)
    signs = generator.choice([-1.0, 1.0], (6, 384)).astype(np.float32)
    scales = generator.normal(0, 1, (6, 3)).astype(np.float16).astype(np.float32)  # d may be negative, too
    raw = q1_0_blocks(signs, scales).data.reshape(-1)
    expected = signs * np.repeat(scales, 128, axis=1)
    np.testing.assert_array_equal(dequantize(tensor("Q1_0", signs.shape), raw), expected)
    np.testing.assert_array_equal(q1_0_scales(tensor("Q1_0", signs.shape), raw), scales)
    packed = q1_0_bits(tensor("Q1_0", signs.shape), raw)
    np.testing.assert_array_equal(packed, np.packbits(signs > 0, axis=1, bitorder="little"))


def test_other_types_are_named() -> None:
    with raises_line(ModelFileError, "x has type Q2_K", "F32, F16, BF16, Q8_0, Q4_0, Q6_K, Q1_0"):
        dequantize(tensor("Q2_K", (1, 256)), np.zeros(84, np.uint8))
