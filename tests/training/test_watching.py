"""What a run tells while it trains: layers, model FLOPs utilisation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support import train_worker
from support.processes import finish, start
from support.tiny_run import model_config, training_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fbiedge.errors import UsageError
from fbiedge.training.checkpoint import load_model
from fbiedge.training.flops import peak_flops, step_flops
from fbiedge.training.loss import head_losses
from fbiedge.training.model import BinaryLinear, Llama
from fbiedge.training.parallel import decoder_layers
from fbiedge.training.progress import run_with_progress
from fbiedge.training.run import RunPlan, execute_run, prepare_run


def prepared(run: Path, text: Path, pattern: str = "column", shared: bool = False, **changes: Any) -> Path:
    model = model_config(pattern, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    training = training_config(**{"steps": 4, "checkpoint_every": 1, "eval_every": 4, "bf16": False, **changes})
    plan = RunPlan(model=model, training=training, teacher=None, shared_scales=shared)
    prepare_run(run, plan, [text], [])
    return run


def binary_linears(model: Llama) -> list[list[BinaryLinear]]:
    return [[m for m in layer.modules() if isinstance(m, BinaryLinear)] for layer in decoder_layers(model)]


@pytest.mark.parametrize(
    ("pattern", "shared"), [("column", False), ("column", True), ("row", False), ("single", False), ("block", False)]
)
def test_layers_are_what_checkpoints_before_and_after_the_step_say(
    pattern: str, shared: bool, text: Path, tmp_path: Path
) -> None:
    run = prepared(tmp_path / "run", text, pattern, shared, micro_batch_size=2)
    models = []
    for report in execute_run(run, log_every=2):
        models.append(binary_linears(load_model(run / "model")))
        assert (report.layers is None) == (report.step in (1, 3))
        if report.layers is None:
            continue
        for before, after, layer in zip(models[-2], models[-1], report.layers, strict=True):
            flips = sum(int(((a.weight >= 0) != (b.weight >= 0)).sum()) for a, b in zip(before, after, strict=True))
            assert flips and layer.flip_flop == flips / sum(linear.weight.numel() for linear in after)
            alphas = torch.cat([linear.scales().flatten() for linear in after]).double()
            # column-shared stores o_proj's and down_proj's alphas rounded to fp16
            close = {"rel": 2e-4 if shared else 1e-7}
            assert layer.alpha_mean == pytest.approx(alphas.mean().item(), **close)
            assert layer.alpha_std == pytest.approx(alphas.std(correction=0).item(), **close)
            if pattern == "block":
                assert layer.beta_mean is None and layer.beta_std is None
                continue
            betas = torch.cat([linear.wbias.flatten() for linear in after]).double()
            assert layer.beta_mean == pytest.approx(betas.mean().item(), abs=1e-12)
            assert layer.beta_std == pytest.approx(betas.std(correction=0).item(), rel=1e-7)


def test_zero_is_positive(text: Path, tmp_path: Path) -> None:
    """A latent that goes from above to zero, or from zero upwards, keeps its sign."""
    from fbiedge.training.layers import LayerWatch
    from fbiedge.training.parallel import team

    model = Llama(model_config("row")).initialize(1)
    watch = LayerWatch(model, team())
    weight = binary_linears(model)[0][0].weight
    with torch.no_grad():
        weight[0, :3] = torch.tensor([0.5, 0.0, -0.0])
        watch.before()
        weight[0, :3] = torch.tensor([0.0, 0.5, 0.0])
        assert watch.after()[0].flip_flop == 0
        watch.before()
        weight[0, 0] = -1e-30
        first, second = watch.after()
    assert first.flip_flop == 1 / sum(linear.weight.numel() for linear in binary_linears(model)[0])
    assert second.flip_flop == 0


def test_two_processes_see_the_layers_that_one_sees(text: Path, tmp_path: Path) -> None:
    kinds = {"column": ("column", False), "shared": ("column", True), "row": ("row", False), "block": ("block", False)}
    for name, (pattern, shared) in kinds.items():
        for folder in ("alone", "together"):
            prepared(tmp_path / folder / name, text, pattern, shared, steps=2, eval_every=1)
    runs = [str(tmp_path / "together" / name) for name in kinds]
    ended = finish(start(2, [train_worker.__file__, *runs]))
    assert [process.code for process in ended] == [0, 0], [process.printed for process in ended]
    reports = [json.loads(line) for line in ended[0].printed.splitlines() if line.startswith("{")]
    for name in kinds:
        alone = [dataclasses.asdict(report)["layers"] for report in execute_run(tmp_path / "alone" / name)]
        together = [report["layers"] for report in reports if report["run"] == name]
        for mine, theirs in zip(alone, together, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                # A gradient near zero, summed in another order, may move its latent the other way: few signs of 37,000
                assert other.pop("flip_flop") == pytest.approx(one.pop("flip_flop"), abs=3e-4)
                assert other == {
                    key: value if value is None else pytest.approx(value, abs=1e-6) for key, value in one.items()
                }


def test_metrics_hold_layers_and_a_full_precision_model_has_none(text: Path, tmp_path: Path) -> None:
    for pattern in ("block", "none"):
        run = prepared(tmp_path / pattern, text, pattern)
        run_with_progress(run, resume=False, console=Console(quiet=True), log_every=2)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [2, 4]
        for record in records:
            assert record["mfu"] is None  # a CPU
            if pattern == "none":
                assert record["layers"] is None
            else:
                names = {"flip_flop", "alpha_mean", "alpha_std", "beta_mean", "beta_std"}
                assert [set(layer) for layer in record["layers"]] == [names, names]


def test_flops_are_those_that_torch_counts(teacher: Path) -> None:
    """torch counts attention as if it were not causal, so a long enough sequence sees the difference; products are exact."""
    tokens, sequences = 32, 2
    student, guide = Llama(model_config("column")).initialize(1), load_model(teacher).requires_grad_(False)
    ids = torch.zeros(sequences, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        with torch.no_grad():
            guided = guide.features(ids), guide.lm_head.weight
        head_losses(student.features(ids), student.lm_head.weight, ids, teacher=guided, chunk=16).loss.backward()
    config = student.config
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * sequences * tokens
    not_causal = 4 * 4 * attention * (tokens - (tokens + 1) / 2)  # three times the student's, once the teacher's
    assert step_flops(student, guide, sequences, tokens) == pytest.approx(counter.get_total_flops() - not_causal)


def test_flops_of_a_teacher_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from fbiedge.training.teacher import ForeignTeacher

    student = Llama(model_config("column"))
    shape = student.config
    same = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
            head_dim=shape.head_dim, tie_word_embeddings=True,
        )
    )  # fmt: skip
    same.save_pretrained(tmp_path / "foreign")
    foreign = ForeignTeacher(tmp_path / "foreign", torch.float32)
    assert step_flops(student, foreign, 2, 8) == step_flops(student, student, 2, 8)


def test_mfu_is_flops_over_time_and_peak(text: Path, tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", text, steps=2)
    plan = dataclasses.replace(RunPlan.load(run), peak_tflops=2.0)
    plan.save(run)
    flops = step_flops(Llama(plan.model), None, 4, 32)
    for report in execute_run(run):
        assert report.mfu == pytest.approx(flops / (4 * 32) * report.tokens_per_second / 2e12)


@pytest.mark.parametrize(
    ("name", "bf16", "expected"),
    [("NVIDIA H100 80GB HBM3", True, 989.4e12), ("NVIDIA A100-SXM4-80GB", False, 19.5e12), ("NVIDIA L4", True, 121e12),
     ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", True, None), ("NVIDIA GeForce RTX 4090 Laptop GPU", True, None)],
)  # fmt: skip
def test_the_peak_is_that_of_the_very_device(
    name: str, bf16: bool, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert peak_flops(torch.device("cuda", 0), bf16, None) == expected
    assert peak_flops(torch.device("cuda", 0), bf16, 3.0) == 3e12
    assert peak_flops(torch.device("cpu"), bf16, None) is None


@pytest.mark.parametrize("given", [0.0, -1.0, np.inf, np.nan])
def test_a_peak_that_is_no_peak_is_refused(given: float) -> None:
    with pytest.raises(UsageError, match="--peak-tflops is"):
        RunPlan(model=model_config("row"), training=training_config(), teacher=None, peak_tflops=given)
