"""What `make bench-peers` compares computes the same, so that it compares speed alone. Nothing here depends on speed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from benchmarks import peer_models

from fbiedge.bits import pack_bits
from fbiedge.config import preset
from fbiedge.exporters.onnx import export_onnx
from fbiedge.session import Session

PEERS = Path(__file__).with_name("peers.py")
BLOCK = replace(preset("tiny"), scaling_pattern="block", intermediate_size=352)  # 352 is not a multiple of 128


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_the_signs_around_the_zero_point(bits: int) -> None:
    signs = np.random.default_rng(bits).choice([-1.0, 1.0], (3, 140)).astype(np.float32)
    codes = peer_models.sign_codes(pack_bits(signs), 140, bits)
    assert codes.shape == (3, 2 * 16 * bits)
    unpacked = (codes[..., None] >> np.arange(0, 8, bits)) & ((1 << bits) - 1)
    values = unpacked.reshape(3, 256).astype(int) - (1 << (bits - 1))
    assert np.array_equal(values[:, :140], signs) and not values[:, 140:].any()


@pytest.mark.parametrize("bits", [2, 4])
def test_stock_models_compute_what_ours_does(bits: int, tmp_path: Path) -> None:
    weights = peer_models.RandomWeights(BLOCK)
    exact = {"accuracy_level": "fp32", "head": "fp32", "kv_cache": "fp32"}
    export_onnx(weights, tmp_path / "ours.onnx", block_scales="fp32", **exact)  # type: ignore[arg-type]
    options = peer_models.ExportOptions(**exact)  # type: ignore[arg-type]
    peer_models.write_stock_onnx(weights, tmp_path / "stock.onnx", bits=bits, options=options)
    ours, stock = (Session.open(tmp_path / f"{name}.onnx", threads=1) for name in ("ours", "stock"))
    assert "BinaryMatMul" not in {node.op_type for node in onnx.load(tmp_path / "stock.onnx").graph.node}
    ids = [1, 2, 300, 4, 5]
    expected = ours.all_logits(ids)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(stock.all_logits(ids), expected, atol=1e-3 * float(np.abs(expected).max()))


def test_stock_models_need_block_scales(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scaling_pattern is 'column', expected 'block'"):
        peer_models.write_stock_onnx(peer_models.RandomWeights(preset("tiny")), tmp_path / "m.onnx", bits=2)


def test_a_run_ends_in_json(tmp_path: Path) -> None:
    """The whole script on a tiny model, without llama.cpp."""
    arguments = "--preset tiny --prompt-tokens 4 --gen-tokens 2 --depth 3 --threads 1 --repetitions 2"
    done = subprocess.run(
        [sys.executable, str(PEERS), *arguments.split(), "--folder", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    rows = document["rows"]
    assert [(row["kind"], row["engine"]) for row in rows] == [
        (kind, engine)
        for kind in ("prefill", "decode")
        for engine in ("fbiedge", "onnxruntime 2-bit", "onnxruntime 4-bit")
    ]
    for row in rows:
        ours = next(r for r in rows if r["engine"] == "fbiedge" and r["kind"] == row["kind"])
        ratio = ours["tokens_per_second"]["median"] / row["tokens_per_second"]["median"]
        assert row["ours_is_times_as_fast"] == pytest.approx(ratio)
    assert document["machine"]["date"] and document["read_gb_per_second"]["1"]["median"] > 0
