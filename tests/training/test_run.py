"""Whole runs on a small text: they learn, they resume exactly, they refuse what can't work, and leave a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.tiny_run import DOCUMENTS, model_config, training_config

from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError, DivergedError, FbiEdgeError, OutputError, UsageError
from fbiedge.reference import Reference
from fbiedge.training import cli
from fbiedge.training.checkpoint import load_model, save_model
from fbiedge.training.divergence import LossWatch
from fbiedge.training.model import Llama
from fbiedge.training.progress import run_with_progress
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.training.shards import open_shards
from fbiedge.training.state import saved_states
from fbiedge.weights import open_checkpoint


@pytest.mark.parametrize("pattern", ["column", "row", "single", "block"])
def test_a_binary_student_learns_from_its_teacher_and_leaves_a_checkpoint(
    pattern: str, text: Path, teacher: Path, tmp_path: Path
) -> None:
    before = {f: f.read_bytes() for f in teacher.iterdir()}
    run = tmp_path / "run"
    prepare_run(run, RunPlan(model=model_config(pattern), training=training_config(), teacher=str(teacher)), [text], [])
    reports = list(execute_run(run))
    assert [r.step for r in reports] == list(range(1, 61))
    assert reports[-1].loss < 0.7 * reports[0].loss
    assert {f: f.read_bytes() for f in teacher.iterdir()} == before

    weights = open_checkpoint(run / "model")
    assert weights.config.scaling_pattern == pattern
    assert "tokenizer.json" in weights.files
    ids = np.random.default_rng(0).integers(3, 300, 40)
    with torch.no_grad():
        expected = load_model(run / "model")(torch.from_numpy(ids)[None])[0].numpy()
    np.testing.assert_allclose(Reference(weights).logits(ids.tolist()), expected, rtol=2e-3, atol=2e-3)


def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(text: Path, teacher: Path, tmp_path: Path) -> None:
    plan = RunPlan(model=model_config("column"), training=training_config(steps=30), teacher=str(teacher))
    prepare_run(tmp_path / "straight", plan, [text], [])
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    straight = [r.loss for r in execute_run(tmp_path / "straight")]

    killed = execute_run(tmp_path / "killed")
    for _ in range(17):  # 7 steps past the last save
        next(killed)
    killed.close()
    resumed = list(execute_run(tmp_path / "killed", resume=True))
    assert [r.step for r in resumed] == list(range(11, 31))
    assert [r.loss for r in resumed] == straight[10:]
    tensors = [load_model(tmp_path / name / "model").state_dict() for name in ("straight", "killed")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_metrics_of_steps_that_are_done_again_are_forgotten(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare_run(run, RunPlan(model=model_config("row"), training=training_config(steps=20), teacher=None), [text], [])
    killed = execute_run(run)
    for _ in range(15):
        next(killed)
    killed.close()
    logged = [{"step": step, "loss": 9.0} for step in (5, 10, 15)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logged) + '{"step": 15, "lo')
    run_with_progress(run, resume=True, console=Console(quiet=True), log_every=5)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20]


def test_a_run_killed_before_its_first_save_starts_again_with_resume(text: Path, tmp_path: Path) -> None:
    plan = RunPlan(model=model_config("row"), training=training_config(steps=12), teacher=None)
    prepare_run(tmp_path / "run", plan, [text], [])
    killed = execute_run(tmp_path / "run")
    first = next(killed)
    killed.close()
    again = list(execute_run(tmp_path / "run", resume=True))
    assert [r.step for r in again] == list(range(1, 13)) and again[0].loss == first.loss


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(number: int, text: Path, tmp_path: Path) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(model_config("column").to_dict()))
    command = [sys.executable, "-c", "import sys; from fbiedge.cli import main; main()", "train", "--data", str(text),
               "--config", str(shape), "-o", str(tmp_path / "run"), "--steps", "100000", "--sequence-length", "32",
               "--checkpoint-every", "100000", "--eval-every", "100000", "--batch-size", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 600
        while not (metrics.exists() and metrics.read_text()):
            assert run.poll() is None and time.monotonic() < deadline, run.stdout.read() if run.stdout else ""
            time.sleep(0.05)
        run.send_signal(number)
        printed, _ = run.communicate(timeout=300)
    assert run.returncode == 130
    assert "go on with --resume" in printed.replace("\n", " ") and "Traceback" not in printed
    assert len(saved_states(tmp_path / "run")) == 1 and open_checkpoint(tmp_path / "run" / "model")


def test_one_text_without_markers_is_enough(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(" ".join(DOCUMENTS * 8))
    run = tmp_path / "run"
    prepare_run(run, RunPlan(model=model_config("row"), training=training_config(steps=2), teacher=None), [book], [])
    assert [r.step for r in execute_run(run)] == [1, 2]
    sizes = [sum(len(shard.tokens) for shard in open_shards(run / name)) for name in ("train", "held_out")]
    assert sizes[1] == pytest.approx(sum(sizes) / 20, rel=0.2)


def test_too_little_text_is_refused_before_the_run_exists(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(" ".join(DOCUMENTS[:40]))
    plan = RunPlan(model=model_config("row"), training=training_config(sequence_length=64), teacher=None)
    with pytest.raises(UsageError, match="the held-out text has .* tokens, expected 129 or more"):
        prepare_run(tmp_path / "run", plan, [book], [])
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_teacher_with_a_shorter_context_is_refused(text: Path, teacher: Path, tmp_path: Path) -> None:
    student = dataclasses.replace(model_config("column"), max_position_embeddings=128)
    plan = RunPlan(model=student, training=training_config(sequence_length=100), teacher=str(teacher))
    with pytest.raises(UsageError, match="longer than the teacher's 64 positions"):
        prepare_run(tmp_path / "run", plan, [text], [])


def test_a_foreign_file_beside_the_model_costs_no_step(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare_run(run, RunPlan(model=model_config("row"), training=training_config(steps=10), teacher=None), [text], [])
    (run / "model").mkdir()
    (run / "model" / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.md"):
        list(execute_run(run))
    (run / "model" / "notes.md").unlink()
    assert list(execute_run(run, resume=True)) == []  # the state of step 10 was saved
    assert open_checkpoint(run / "model")  # and its model is written now


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    config = training_config(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("every", [1, 10])
def test_a_loss_that_is_no_number_stops_the_run_and_leaves_no_model_of_it(
    every: int, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    training = training_config(learning_rate=1e20, checkpoint_every=every)
    prepare_run(run, RunPlan(model=model_config("column"), training=training, teacher=None), [text], [])
    with pytest.raises(DivergedError, match="nothing was saved before; start again with a lower learning rate"):
        list(execute_run(run))
    assert not (run / "model").exists() and not list(run.glob(".*")) and not saved_states(run)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_state_that_gives_no_number_is_not_kept(in_background: bool, text: Path, tmp_path: Path) -> None:
    """The last step with a finite loss may be the one that broke the weights, and was saved all the same."""
    run = tmp_path / "run"
    training = training_config(steps=8, checkpoint_every=2, async_checkpoint=in_background)
    prepare_run(run, RunPlan(model=model_config("column"), training=training, teacher=None), [text], [])
    plan = RunPlan.load(run)
    good = [report.loss for report in execute_run(run, stop=iter([False, True]).__next__)]
    assert len(good) == 2
    broken = dataclasses.replace(plan.training, learning_rate=1e20, checkpoint_every=1)
    dataclasses.replace(plan, training=broken).save(run)
    with pytest.raises(DivergedError, match=r"step 4: .*nan; the state of step 2 is good; go on"):
        list(execute_run(run, resume=True))
    assert [path.name for path in saved_states(run)] == ["00000002"]
    assert all(
        torch.isfinite(tensor).all() and tensor.abs().max() < 1e6
        for tensor in load_model(run / "model").state_dict().values()
    )
    plan.save(run)
    assert [report.step for report in execute_run(run, resume=True)] == list(range(3, 9))


def test_what_may_change_is_given_to_a_resumed_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    prepare_run(out, RunPlan(model=model_config("column"), training=training_config(steps=6), teacher=None), [text], [])
    list(execute_run(out, stop=iter([False, True]).__next__))
    cli.main(["-o", str(out), "--resume", "--learning-rate", "1e-4", "--micro-batch-size", "2", "--eval-every", "3"])
    training = RunPlan.load(out).training
    assert training == training_config(steps=6, learning_rate=1e-4, micro_batch_size=2, eval_every=3)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["learning_rate"] == pytest.approx(training.learning_rate_at(5))
    with pytest.raises(UsageError, match=r"--resume goes on with .*; leave --batch-size and --seed out"):
        cli.main(["-o", str(out), "--resume", "--batch-size", "2", "--seed", "3"])
    with pytest.raises(UsageError, match=r"learning_rate is -1"):
        cli.main(["-o", str(out), "--resume", "--learning-rate", "-1"])


def test_a_run_that_diverged_has_the_model_of_its_last_state(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where states were saved in the background, without their models."""
    runs = {}
    for in_background in (True, False):
        runs[in_background] = tmp_path / str(in_background)
        training = training_config(steps=8, checkpoint_every=3, async_checkpoint=in_background)
        prepare_run(
            runs[in_background], RunPlan(model=model_config("column"), training=training, teacher=None), [text], []
        )
    see = LossWatch.see
    monkeypatch.setattr(LossWatch, "see", lambda *taken: "enough" if taken[1] == 7 else see(*taken))
    for run in runs.values():
        with pytest.raises(
            DivergedError, match="enough; the state of step 6 is good; go on from it with --resume and a lower"
        ):
            list(execute_run(run))
    found, expected = (load_model(run / "model").state_dict() for run in runs.values())
    assert all(found[name].equal(expected[name]) for name in expected)


def test_compiled_a_run_has_the_same_losses(text: Path, teacher: Path, tmp_path: Path) -> None:
    """With all that layers can do at once: rounded head, layers computed again backward, micro batches, a resume."""
    losses = {}
    for compiled in (False, True):
        training = training_config(
            steps=6, bf16=False, compile=compiled, activation_checkpointing=True, micro_batch_size=2, head="int8",
            checkpoint_every=3, eval_every=3,
        )  # fmt: skip
        plan = RunPlan(model=model_config("column"), training=training, teacher=str(teacher), shared_scales=True)
        run = tmp_path / str(compiled)
        prepare_run(run, plan, [text], [])
        first = execute_run(run)
        reports = [next(first) for _ in range(3)]
        first.close()
        reports += execute_run(run, resume=True)
        losses[compiled] = [report.loss for report in reports] + [report.eval_loss for report in reports[2::3]]
    assert len(losses[True]) == 8
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_the_command_trains_and_resumes(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(model_config("column").to_dict()))
    out = tmp_path / "run"
    arguments = ["--data", str(text), "--config", str(shape), "-o", str(out), "--steps", "12", "--batch-size", "2",
                 "--sequence-length", "32", "--checkpoint-every", "6", "--eval-every", "6"]  # fmt: skip
    cli.main(arguments)
    printed = capsys.readouterr().out
    assert "held-out" in printed and f"fbiedge export {out}" in printed.replace("\n", "")
    assert open_checkpoint(out / "model").config == model_config("column")
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 2
    with pytest.raises(UsageError, match="add --resume"):
        cli.main(arguments)
    cli.main(["-o", str(out), "--resume"])
    assert "is complete" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "TEXT", "--preset", "huge"], "unknown preset 'huge'"),
        ([], "no --data given"),
        (["--data", "TEXT", "--scaling-pattern", "diagonal"], "unknown scaling pattern"),
        (["--data", "TEXT", "--steps", "0"], "steps is 0"),
        (["--data", "TEXT", "--sequence-length", "100000"], "longer than the model's"),
        (["--data", "TEXT", "--teacher", "/nonexistent"], "nonexistent"),
        (["--resume"], "no run to resume"),
        (["--resume", "--steps", "9", "--no-bf16"], "leave --bf16 and --steps out"),
        (["--data", "TEXT", "--seed", "-1"], "seed is -1"),
        (["--data", "TEXT", "--weight-decay", "-1"], "weight_decay is -1"),
        (["--data", "TEXT", "--grad-clip", "nan"], "grad_clip is nan"),
        (["--data", "TEXT", "--beta2", "1"], "beta2 is 1.0"),
        (["--data", "TEXT", "--preset", "tiny", "--config", "TEXT"], "leave one out"),
        (["--data", "TEXT", "--config", "TEXT"], "not JSON"),
        (["--data", "TEXT", "--stepz", "3"], "fbiedge train --help"),
        (["--data", "TEXT", "--embedding", "int2"], "embedding is 'int2', expected one of fp32, int8, int4"),
        (["--data", "TEXT", "--one-hot-share", "0"], "--one-hot-share has no effect without a --teacher; leave it out"),
        (["--data", "TEXT", "--teacher-dtype", "bf16"], "--teacher-dtype has no effect without a --teacher"),
        (["--data", "TEXT", "--vocab-size", "5000"], "give more text or a smaller vocabulary"),
    ],
)
def test_unusable_options_are_named(arguments: list[str], message: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(FbiEdgeError, match=message):
        cli.main([*(str(text) if a == "TEXT" else a for a in arguments), "-o", str(tmp_path / "run")])


def test_a_tied_embedding_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    config = dataclasses.replace(model_config("column"), tie_word_embeddings=True)
    model = Llama(config).initialize(seed=4)
    save_model(model, tmp_path / "model", {})
    loaded = load_model(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_a_damaged_state_is_refused(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare_run(run, RunPlan(model=model_config("row"), training=training_config(steps=10), teacher=None), [text], [])
    list(execute_run(run))
    [state] = saved_states(run)
    data = state / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="state/00000010 can't be resumed"):
        list(execute_run(run, resume=True))


@pytest.mark.parametrize("change", [{"model_type": "qwen3"}, {"rope_scaling": {"type": "linear", "factor": 2.0}}])
def test_what_training_would_compute_as_another_model_is_refused(change: dict, tmp_path: Path) -> None:
    raw = model_config("column").to_dict()
    del raw["rope_parameters"]
    plan = RunPlan(model=ModelConfig.from_dict(raw | change), training=training_config(), teacher=None)
    with pytest.raises(UsageError, match="training knows a Llama with unscaled RoPE only"):
        prepare_run(tmp_path / "run", plan, [], [])
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_vocabulary_is_refused(text: Path, teacher: Path, tmp_path: Path) -> None:
    student = ModelConfig.from_dict({**model_config("column").to_dict(), "vocab_size": 310})
    plan = RunPlan(model=student, training=training_config(), teacher=str(teacher))
    with pytest.raises(UsageError, match="300 pieces, the student's 310"):
        prepare_run(tmp_path / "run", plan, [text], [])
