"""Head and embedding trained as they will be exported: the same numbers, gradients straight through, an export without loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tiny_run import model_config, training_config

from fbiedge.cli import run as fbiedge
from fbiedge.errors import UsageError
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.exporters.onnx.head import quantize_rows
from fbiedge.reference import Reference
from fbiedge.session import Session
from fbiedge.training.checkpoint import load_model
from fbiedge.training.config import Precision
from fbiedge.training.loss import head_losses
from fbiedge.training.model import Llama
from fbiedge.training.prepare import open_batches, prepare_run
from fbiedge.training.quantized_head import Embedding, quantized
from fbiedge.training.run import RunPlan, execute_run
from fbiedge.weights import open_checkpoint

BITS: dict[Precision, int] = {"int8": 8, "int4": 4}


def weights(n: int, k: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(4, (n, k)).astype(np.float32) * 0.05
    weight[0] = 0
    weight[1] = 1e-9  # a scale that fp16 rounds to 0
    return torch.from_numpy(weight)


@pytest.mark.parametrize("k", [32, 64, 100, 7])
@pytest.mark.parametrize("precision", BITS)
def test_the_numbers_are_the_exporters_to_the_last_bit(precision: Precision, k: int) -> None:
    weight = weights(3000, k, seed=k)
    weight[2] = torch.tensor([0.5, -0.5]).repeat(k)[:k]  # which of two largest weights is scaled by
    expected = quantize_rows(weight.numpy(), BITS[precision]).dequantize(k)
    assert np.array_equal(quantized(weight, precision).numpy(), expected)


@pytest.mark.parametrize("precision", BITS)
def test_gradients_go_straight_through(precision: Precision) -> None:
    weight, x = weights(20, 64, seed=1).requires_grad_(), torch.randn(5, 64)
    rounded = quantized(weight, precision)
    (x @ rounded.T).square().sum().backward()
    dense = rounded.detach().requires_grad_()
    (x @ dense.T).square().sum().backward()
    assert weight.grad is not None and dense.grad is not None
    assert torch.equal(weight.grad, dense.grad)
    assert quantized(weight, "fp32") is weight


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("tokens", [10, 500], ids=["few tokens", "many tokens"])
def test_an_embedding_is_looked_up_rounded_whichever_way_is_shorter(precision: Precision, tokens: int) -> None:
    table = Embedding(50, 72)
    table.precision = precision
    with torch.no_grad():
        table.weight.copy_(weights(50, 72, seed=2))
    ids = torch.randint(0, 50, (2, tokens // 2), generator=torch.Generator().manual_seed(3))
    got = table(ids)
    assert torch.equal(got, quantized(table.weight, precision)[ids])
    upstream = torch.randn(got.shape)
    (by_table,) = torch.autograd.grad(got, table.weight, upstream)
    (by_rows,) = torch.autograd.grad(F.embedding(ids, table.weight), table.weight, upstream)
    assert torch.equal(by_table, by_rows)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("precision", BITS)
def test_an_export_computes_what_training_computed(
    precision: Precision, tied: bool, text: Path, tmp_path: Path
) -> None:
    """Rows bit for bit, logits to rounding; a student whose embedding is rounded only then computes another model."""
    training = training_config(
        steps=4, eval_every=4, checkpoint_every=4, bf16=False, head=precision, embedding=precision,
        activation_checkpointing=True,
    )  # fmt: skip
    config = model_config("column", tie_word_embeddings=tied)
    prepare_run(tmp_path / "run", RunPlan(model=config, training=training, teacher=None), [text], [])
    students: list[Llama] = []
    list(execute_run(tmp_path / "run", on_start=lambda model, _: students.append(model)))
    (student,) = students
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        rows, features = student.model.embed_tokens(ids), student.features(ids)
        logits = features @ quantized(student.lm_head.weight, precision).T
    export_onnx(
        open_checkpoint(tmp_path / "run" / "model"), tmp_path / "model.onnx", head=precision, embedding=precision,
        accuracy_level="fp32", kv_cache="fp32",
    )  # fmt: skip
    exported = open_onnx(tmp_path / "model.onnx")
    assert np.array_equal(exported.tensor("model.embed_tokens.weight")[ids[0]], rows[0].numpy())
    for got in (
        Reference(exported).logits(ids[0].tolist()),
        Session.open(tmp_path / "model.onnx").all_logits(ids[0].tolist()),
    ):
        np.testing.assert_allclose(got, logits[0].numpy(), rtol=0, atol=2e-5 * logits.abs().max().item())
    plain = Reference(open_checkpoint(tmp_path / "run" / "model")).logits(ids[0].tolist())
    assert np.abs(plain - logits[0].numpy()).max() > 1e-3 * logits.abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_is_exported_as_it_was_trained(
    tied: bool, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = training_config(steps=2, head="int8", embedding="int8")
    config = model_config("column", tie_word_embeddings=tied, hidden_size=128, head_dim=64)
    plan = RunPlan(model=config, training=training, teacher=None, shared_scales=True)
    prepare_run(tmp_path / "run", plan, [text], [])
    list(execute_run(tmp_path / "run"))
    model, onnx, gguf = tmp_path / "run" / "model", tmp_path / "model.onnx", tmp_path / "model.gguf"
    rounded = quantized(torch.from_numpy(open_checkpoint(model).tensor("model.embed_tokens.weight")), "int8").numpy()
    assert fbiedge(["export", str(model), "-o", str(onnx)]) == 0
    assert "embedding int8, as it was trained" in capsys.readouterr().out
    np.testing.assert_array_equal(open_onnx(onnx).tensor("model.embed_tokens.weight"), rounded)
    assert fbiedge(["export", str(model), "-o", str(gguf)]) == 0
    printed = capsys.readouterr().out
    assert "embedding q8_0, as it was trained" in printed and ("head q8_0" in printed) != tied
    assert fbiedge(["export", str(model), "--embedding", "fp32", "--head", "fp32", "-o", str(onnx)]) == 0
    assert "as it was trained" not in capsys.readouterr().out
    plain = open_checkpoint(model).tensor("model.embed_tokens.weight")
    np.testing.assert_array_equal(open_onnx(onnx).tensor("model.embed_tokens.weight"), plain)


def test_a_tied_model_has_one_precision(text: Path, tmp_path: Path) -> None:
    plan = RunPlan(
        model=model_config("column", tie_word_embeddings=True), training=training_config(head="int8"), teacher=None
    )
    with pytest.raises(UsageError, match="head is 'int8' and embedding 'fp32', but they are one matrix in this model"):
        prepare_run(tmp_path / "run", plan, [text], [])
    with pytest.raises(UsageError, match="embedding is 'int2', expected one of fp32, int8, int4"):
        training_config(embedding="int2")


def test_a_run_from_before_there_was_the_choice_goes_on(text: Path, tmp_path: Path) -> None:
    """Also a tied one whose head was rounded and whose embedding was not."""
    plan = RunPlan(
        model=model_config("column", tie_word_embeddings=True),
        training=training_config(steps=4, checkpoint_every=2, head="int8", embedding="int8"),
        teacher=None,
    )
    run = tmp_path / "run"
    prepare_run(run, plan, [text], [])
    raw = json.loads((run / "run.json").read_text())
    del raw["training"]["embedding"]
    (run / "run.json").write_text(json.dumps(raw))
    done = 0

    def stop() -> bool:
        return done == 1

    for report in execute_run(run, stop=stop):
        done = report.step
    assert RunPlan.load(run).training.embedding == "fp32"
    assert [report.step for report in execute_run(run, resume=True)] == [3, 4]


@pytest.mark.parametrize("precision", BITS)
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
    assert last.eval_loss is not None and got == pytest.approx(last.eval_loss, rel=1e-5)
    assert 4 * abs(got - last.eval_loss) < abs(rounded_never - last.eval_loss)  # 8 bits change little, but that is seen
