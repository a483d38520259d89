"""From training to a file that runs: what was trained is what the exported model computes, in every scaling form."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_run import model_config, training_config

from fbiedge.errors import UsageError
from fbiedge.exporters.gguf.export import export_gguf
from fbiedge.exporters.gguf.reader import open_gguf
from fbiedge.exporters.onnx import export_onnx
from fbiedge.reference import Reference
from fbiedge.session import Session
from fbiedge.training.checkpoint import load_model
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.weights import BinaryLinear, open_checkpoint

IDS = np.random.default_rng(0).integers(3, 300, 40).tolist()
SCALINGS = ["column", "column-shared", "row", "single", "block", "none"]


@pytest.fixture(scope="module", params=SCALINGS)
def trained(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of a few steps, enough to move every scale; 160 inputs of down_proj are a block and a part."""
    pattern = request.param.removesuffix("-shared")
    run = tmp_path_factory.mktemp(request.param) / "run"
    model = model_config(pattern, hidden_size=128, intermediate_size=160, num_key_value_heads=1, head_dim=64)
    plan = RunPlan(
        model=model, training=training_config(steps=6, warmup_steps=0), teacher=None,
        shared_scales=request.param == "column-shared",
    )  # fmt: skip
    prepare_run(run, plan, [text], [])
    list(execute_run(run))
    return run / "model"


def torch_logits(checkpoint: Path) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = load_model(checkpoint)(torch.tensor([IDS]))[0].numpy()
    return logits


def test_onnx_computes_what_was_trained(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    export_onnx(open_checkpoint(trained), out, accuracy_level="fp32", head="fp32", block_scales="fp32", kv_cache="fp32")
    got = Session.open(out, threads=1).all_logits(IDS)
    np.testing.assert_allclose(got, torch_logits(trained), rtol=1e-4, atol=5e-4)


def test_gguf_holds_what_was_trained_but_for_scales_of_each_matrix(
    trained: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    scaling = request.node.callspec.params["trained"]
    weights, out = open_checkpoint(trained), tmp_path / "model.gguf"
    if scaling == "column":
        with pytest.raises(UsageError, match="fbiedge train --init CHECKPOINT --scaling column-shared"):
            export_gguf(weights, out, calibration_ids=IDS)
        return
    report = export_gguf(weights, out)
    assert report.exact and not report.errors and not report.clamped
    back = open_gguf(out)
    got = Reference(back).logits(IDS)
    error = np.sqrt(np.mean((got - torch_logits(trained)) ** 2)) / got.std()
    assert error < 1e-3  # embedding and head are fp16, and so are the scales of row, single and block
    if scaling == "column-shared":  # whose scales were stored rounded: what became d is in the file bit for bit
        for layer, name in itertools.product((0, 1), ("self_attn.o_proj", "mlp.down_proj")):
            before, after = (w.linear(f"model.layers.{layer}.{name}") for w in (weights, back))
            assert isinstance(before, BinaryLinear) and isinstance(after, BinaryLinear)
            assert np.array_equal(abs(before.alpha), abs(after.alpha))
