"""A head that is trained as it will be exported: the same numbers, gradients straight through, an export without loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_run import model_config, training_config

from fbiedge.exporters.onnx.head import quantize_rows
from fbiedge.training.checkpoint import load_model
from fbiedge.training.loss import head_losses
from fbiedge.training.prepare import open_batches, prepare_run
from fbiedge.training.quantized_head import quantized
from fbiedge.training.run import RunPlan, execute_run

BITS = {"int8": 8, "int4": 4}


def weights(n: int, k: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(4, (n, k)).astype(np.float32) * 0.05
    weight[0] = 0
    weight[1] = 1e-9  # a scale that fp16 rounds to 0
    return torch.from_numpy(weight)


@pytest.mark.parametrize("k", [32, 64, 100, 7])
def test_int8_is_the_exporters_to_the_last_bit(k: int) -> None:
    weight = weights(60, k, seed=k)
    expected = quantize_rows(weight.numpy(), 8).dequantize(k)
    assert np.array_equal(quantized(weight, "int8").numpy(), expected)


@pytest.mark.parametrize("k", [32, 64, 100, 7])
def test_int4_is_the_exporters_but_for_ties(k: int) -> None:
    weight = weights(400, k, seed=k)
    got, expected = quantized(weight, "int4").numpy(), quantize_rows(weight.numpy(), 4).dequantize(k)
    assert (got != expected).any(axis=1).mean() < 0.01
    errors = [np.square(rounded - weight.numpy()).sum() for rounded in (got, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_gradients_go_straight_through(precision: str) -> None:
    weight, x = weights(20, 64, seed=1).requires_grad_(), torch.randn(5, 64)
    rounded = quantized(weight, precision)  # type: ignore[arg-type]
    (x @ rounded.T).square().sum().backward()
    dense = rounded.detach().requires_grad_()
    (x @ dense.T).square().sum().backward()
    assert weight.grad is not None and dense.grad is not None
    assert torch.equal(weight.grad, dense.grad)
    assert quantized(weight, "fp32") is weight


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_loss_watched_in_training_is_that_of_the_exported_head(precision: str, text: Path, tmp_path: Path) -> None:
    training = training_config(steps=20, eval_every=20, eval_sequences=4, bf16=False, head=precision)
    plan = RunPlan(model=model_config("column"), training=training, teacher=None)
    prepare_run(tmp_path / "run", plan, [text], [])
    *_, last = execute_run(tmp_path / "run")
    model = load_model(tmp_path / "run" / "model")
    latent = model.lm_head.weight.detach()
    exported = torch.from_numpy(quantize_rows(latent.numpy(), BITS[precision]).dequantize(latent.shape[1]))
    ids, targets = map(torch.from_numpy, open_batches(tmp_path / "run", plan)[1].batch(0))
    with torch.no_grad():
        features = model.features(ids)
        got, rounded_never = (
            head_losses(features, head, targets, chunk=64).one_hot.item() for head in (exported, latent)
        )
    assert got == pytest.approx(last.eval_loss, rel=1e-5)
    assert got != pytest.approx(rounded_never, rel=1e-5)
