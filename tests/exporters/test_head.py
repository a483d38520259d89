"""The quantised head: what quantising loses, its packings byte by byte, its fallback, and the way through files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.checkpoints import small_checkpoint, small_config
from support.matmul_nbits import op_model as nbits_model
from support.matmul_nbits import problem
from support.tiny_model import tiny_model

from fbiedge.errors import CheckpointError
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.exporters.onnx.fallback_head import half_tables, matmul_nbits_function
from fbiedge.exporters.onnx.head import (
    QuantizedRows,
    dequantize_stock,
    quantize_rows,
    rows_from_stock,
    rows_from_tiles,
)
from fbiedge.session import Session
from fbiedge.weights import open_checkpoint

BITS = {"int8": 8, "int4": 4}
SIZES = [(1, 1), (5, 31), (16, 128), (33, 64), (80, 172)]


def same_head(a: QuantizedRows, b: QuantizedRows) -> bool:
    return a.bits == b.bits and np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_8_bits_err_by_at_most_half_a_step(n: int, k: int) -> None:
    weight = np.random.default_rng(3).normal(size=(n, k)).astype(np.float32)
    weight[0] = 0
    head = quantize_rows(weight, 8)
    assert head.codes.shape == (n, -(-k // 32), 32) and head.scales.shape == (n, -(-k // 32))
    step = np.repeat(head.scales.astype(np.float32), 32, axis=1)[:, :k]
    assert (np.abs(head.dequantize(k) - weight) <= 0.5651 * step).all()  # 0.5, and 127 times what fp16 rounds off
    assert not head.dequantize(k)[0].any()


@pytest.mark.parametrize("scale", [0.02, 3e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("bits", [4, 8])
def test_small_weights_never_come_back_larger_or_as_nonsense(bits: int, scale: float) -> None:
    """Below 2^-14, fp16 scales are subnormal and coarse; at last they are 0 and so is the block."""
    weight = np.random.default_rng(4).normal(0, scale, (64, 96)).astype(np.float32)
    back = quantize_rows(weight, bits).dequantize(96)
    assert np.abs(back).max() <= 1.5 * np.abs(weight).max()
    assert np.sqrt(((back - weight) ** 2).mean()) <= scale * (1 if scale < 1e-5 else 0.1)


def test_4_bits_err_by_less_than_plain_rounding() -> None:
    """Normal weights: 8.2 % of their norm, where max / -8 as in ggml's Q4_0 loses 8.6 %."""
    weight = np.random.default_rng(5).normal(0, 0.02, (512, 768)).astype(np.float32)
    error = quantize_rows(weight, 4).dequantize(768) - weight
    relative = np.sqrt((error**2).mean() / (weight**2).mean())
    blocks = weight.reshape(512, -1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    step = (largest / -8).astype(np.float16).astype(np.float32)
    plain = np.clip(np.rint(blocks / step), -8, 7) * step - blocks
    assert 0.05 < relative < 0.083 < np.sqrt((plain**2).mean() / (blocks**2).mean()) < 0.09


def test_weights_beyond_fp16_scales_are_refused() -> None:
    with pytest.raises(CheckpointError, match="lm_head.weight is too large for fp16 scales"):
        quantize_rows(np.full((1, 32), 1e8, np.float32), 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_packings_hold_what_they_say_and_come_back(n: int, k: int, bits: int) -> None:
    p = problem(1, n, k, bits)
    blocks = -(-k // 32)
    codes = np.full((n, blocks * 32), 1 << (bits - 1), np.uint8)
    codes[:, :k] = p.codes
    head = QuantizedRows(bits=bits, codes=codes.reshape(n, blocks, 32), scales=p.scales)
    np.testing.assert_allclose(head.dequantize(k), p.weight, rtol=1e-6)
    # Padding inside a block holds the zero point; the specification leaves it open.
    np.testing.assert_array_equal(head.tiles(), replace(p, k=blocks * 32, codes=codes).tiles())
    assert same_head(rows_from_tiles(head.tiles(), bits, n, k), head)
    packed, scales = head.stock()
    assert packed.shape == (n, blocks, 4 * bits) and scales.shape == (n * blocks,)
    np.testing.assert_array_equal(dequantize_stock(packed, scales, bits, k), head.dequantize(k))
    back = rows_from_stock(packed, scales, bits)
    assert back is not None and same_head(back, head)
    assert rows_from_stock(packed, scales * np.float32(1.0001), bits) is None


def test_half_tables_give_every_finite_number() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    numbers = halves.view(np.float16).astype(np.float32)
    base, step = half_tables()
    got = base[halves >> 8] + (halves & 255).astype(np.float32) * step[halves >> 8]
    finite = np.isfinite(numbers)
    np.testing.assert_array_equal(got[finite], numbers[finite])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [*SIZES, (48, 300)])
def test_the_fallback_equals_the_formula_and_folds(n: int, k: int, bits: int, tmp_path: Path) -> None:
    p = problem(3, n, k, bits)
    model = nbits_model(p, accuracy_level=1, functions=[matmul_nbits_function(bits)])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"A": p.x})
    assert (np.abs(y - p.expected()) <= 2e-6 * p.magnitude() + 1e-30).all()
    assert Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node) == {"MatMulNBits": 1}


@pytest.mark.parametrize("external", [False, True], ids=["embedded", "external"])
@pytest.mark.parametrize("head", ["int8", "int4"])
@pytest.mark.parametrize("pattern", ["column", "none"])
def test_a_model_read_back_exports_to_the_same_bytes(pattern: str, head: str, external: bool, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "checkpoint", small_config(pattern, head_dim=16))
    weights = open_checkpoint(tmp_path / "checkpoint")
    limit = {"embed_limit_bytes": 0} if external else {}
    paths = [tmp_path / name / "model.onnx" for name in ("first", "second")]
    for path in paths:
        path.parent.mkdir()
    export_onnx(weights, paths[0], head=head, **limit)
    back = open_onnx(paths[0])
    export_onnx(back, paths[1], head=head, **limit)
    for name in ("model.onnx", "model.onnx.data") if external else ("model.onnx",):
        assert paths[0].with_name(name).read_bytes() == paths[1].with_name(name).read_bytes()
    expected = quantize_rows(weights.tensor("lm_head.weight"), BITS[head])
    np.testing.assert_array_equal(back.tensor("lm_head.weight"), expected.dequantize(weights.config.hidden_size))


def test_a_head_of_another_precision_is_quantised_anew(tmp_path: Path) -> None:
    first = tiny_model(tmp_path, export={"head": "int8"})
    export_onnx(open_onnx(first), tmp_path / "int4.onnx", head="int4")
    expected = quantize_rows(open_onnx(first).tensor("lm_head.weight"), 4).dequantize(72)
    np.testing.assert_array_equal(open_onnx(tmp_path / "int4.onnx").tensor("lm_head.weight"), expected)


@pytest.mark.parametrize("head", ["int8", "int4", "fp32"])
def test_the_file_says_what_its_head_is(head: str, tmp_path: Path) -> None:
    model = onnx.load(tiny_model(tmp_path, export={"head": head}))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["fbiedge.head"] == head
    assert metadata["fbiedge.head_operator"] == ("stock" if head == "fp32" else "fbiedge")
    (row,) = (row for row in json.loads(metadata["fbiedge.inventory"]) if row["group"] == "head")
    assert row["form"] == ("fp32" if head == "fp32" else f"{head} block 32")
    (node,) = (node for node in model.graph.node if node.name == "lm_head")
    assert (node.domain, node.op_type) == (("", "MatMul") if head == "fp32" else ("fbiedge", "MatMulNBits"))


@pytest.mark.parametrize("head", ["int8", "int4"])
def test_fp32_activations_at_run_time_reach_the_head(head: str, tmp_path: Path) -> None:
    """Then nothing is left of int8: the logits are those of a file exported with fp32 activations."""
    paths = {}
    for level in ("int8", "fp32"):
        folder = tmp_path / level
        folder.mkdir()
        paths[level] = tiny_model(folder, export={"accuracy_level": level, "head": head})
    ids = [3, 1, 4, 1, 5, 9]
    sessions = [Session.open(paths["int8"], accuracy_level="fp32"), Session.open(paths["fp32"])]
    assert [session.head_activations for session in sessions] == ["fp32", "fp32"]
    logits = [session.all_logits(ids) for session in sessions]
    np.testing.assert_array_equal(*logits)
    assert np.abs(Session.open(paths["int8"]).all_logits(ids) - logits[0]).max() > 1e-4
