"""What a run writes down: no step twice, whatever stopped it; what can't be written or isn't installed is one line."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from support.processes import finish, start
from support.tiny_run import model_config, training_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fbiedge.errors import OutputError, UsageError
from fbiedge.training import cli, progress
from fbiedge.training.flops import step_flops
from fbiedge.training.loggers import EventFile, forget_from, open_log, scalars
from fbiedge.training.model import Llama
from fbiedge.training.progress import run_with_progress
from fbiedge.training.run import RunPlan, execute_run, prepare_run


def prepared(run: Path, text: Path, **changes: Any) -> RunPlan:
    plan = RunPlan(model=model_config("column"), training=training_config(steps=20), teacher=None, **changes)
    prepare_run(run, plan, [text], [])
    return plan


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def options(text: Path, shape: Path, run: Path) -> list[str]:
    shape.write_text(json.dumps(model_config("column").to_dict()))
    return ["--data", str(text), "--config", str(shape), "-o", str(run), "--steps", "4", "--batch-size", "2",
            "--sequence-length", "32", "--eval-every", "2"]  # fmt: skip


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package: keeps what it is asked."""
    module: Any = ModuleType("wandb")
    module.runs = []

    class Run:
        def __init__(self, **options: Any) -> None:
            self.options, self.lines, self.code = options, {}, None
            module.runs.append(self)

        def log(self, values: dict[str, float], step: int) -> None:
            assert self.code is None and step not in self.lines
            self.lines[step] = values

        def finish(self, exit_code: int) -> None:
            self.code = exit_code

    module.init = Run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_tensorboard_shows_each_step_once_after_a_kill(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = prepared(run, text, tensorboard=True)
    killed = execute_run(run)  # saves after step 10
    with open_log(run, plan, print) as log:
        log.begin(1)
        for report in (next(killed) for _ in range(15)):
            log.write(report)
    killed.close()
    run_with_progress(run, resume=True, console=Console(quiet=True), log_every=1)
    shown, lines = logged(run), records(run)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert len(list((run / "tensorboard").iterdir())) == 2
    for tag, key in {"loss/train": "loss", "train/grad_norm": "grad_norm", "train/tokens": "tokens"}.items():
        assert shown[tag] == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
    assert shown["loss/held_out"] == [(20, pytest.approx(lines[-1]["eval_loss"], rel=1e-6))]
    assert shown["flip_flop/layer_01"][-1] == (20, pytest.approx(lines[-1]["layers"][1]["flip_flop"], rel=1e-6))
    assert "beta_std/layer_00" in shown and "train/mfu" not in shown and "loss/distillation" not in shown


def test_weights_and_biases_gets_one_run_whatever_stopped_it(wandb: Any, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cli.main([*options(text, tmp_path / "shape.json", run), "--wandb", "project"])
    [first] = wandb.runs
    assert first.options["project"] == "project" and first.options["name"] == "run"
    assert first.options["config"]["training"]["steps"] == 4 and first.options["dir"] == str(run)
    assert first.code == 0 and list(first.lines) == [2, 4]
    assert first.lines[4] == scalars_of(records(run)[-1])

    cli.main(["-o", str(run), "--resume"])
    assert len(wandb.runs) == 1  # there was nothing left to do
    plan = RunPlan.load(run)
    assert plan.wandb_run == first.options["id"]
    with pytest.raises(KeyboardInterrupt), open_log(run, plan, print):
        raise KeyboardInterrupt
    assert wandb.runs[1].options["id"] == first.options["id"] and wandb.runs[1].options["resume"] == "allow"
    assert wandb.runs[1].code == 1


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    from fbiedge.training.layers import LayerReport
    from fbiedge.training.trainer import StepReport

    layers = record.pop("layers")
    return scalars(StepReport(**record, layers=tuple(LayerReport(**layer) for layer in layers)))


def test_a_service_that_fails_later_costs_no_training(wandb: Any, text: Path, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the service\nis gone")

    run, printed = tmp_path / "run", io.StringIO()
    prepared(run, text, wandb="project", wandb_run="1")
    wandb.init = lambda **options: type("Broken", (), {"log": fail, "finish": fail})()
    report = run_with_progress(run, resume=False, console=Console(file=printed, width=200))
    assert report is not None and report.step == 20 and len(records(run)) == 2
    assert printed.getvalue().count("Weights & Biases fails, and is left out from here on: the service is gone") == 1


def test_a_service_that_is_not_there_is_said_before_the_training(wandb: Any, text: Path, tmp_path: Path) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key.")

    run = tmp_path / "run"
    prepared(run, text, wandb="project")
    wandb.init = refuse
    with pytest.raises(UsageError, match=r"can't start: no API key; .*WANDB_MODE=offline.* --resume"):
        run_with_progress(run, resume=False, console=Console(quiet=True))
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("option", "package", "advice"),
    [(["--tensorboard"], "tensorboard", r"pip install 'fbiedge\[tensorboard\]'"),
     (["--wandb", "project"], "wandb", "pip install wandb")],
)  # fmt: skip
def test_a_missing_package_is_said_before_anything_is_written(
    option: list[str], package: str, advice: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    given = options(text, tmp_path / "shape.json", run)
    with monkeypatch.context() as missing:
        for name in [name for name in sys.modules if name.split(".")[0] == package] or [package]:
            missing.setitem(sys.modules, name, None)
        with pytest.raises(UsageError, match=advice):
            cli.main([*given, *option])
        assert not run.exists()
    cli.main(given)
    written = (run / "run.json").read_bytes()
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(UsageError, match=advice):
        cli.main(["-o", str(run), "--resume", *option])
    assert (run / "run.json").read_bytes() == written


def test_how_a_run_is_watched_may_change_when_it_goes_on_and_is_remembered(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = prepared(run, text)
    cli.main(["-o", str(run), "--resume", "--tensorboard", "--peak-tflops", "0.5"])
    after = RunPlan.load(run)
    assert (after.tensorboard, after.peak_tflops) == (True, 0.5) and after.training == plan.training
    assert [step for step, _ in logged(run)["train/mfu"]] == [10, 20]
    cli.main(["-o", str(run), "--resume"])
    assert RunPlan.load(run) == after
    cli.main(["-o", str(run), "--resume", "--no-tensorboard"])
    assert not RunPlan.load(run).tensorboard


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_disk_that_fills_is_one_line(name: str, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = prepared(run, text, tensorboard=True)
    reports = list(execute_run(run, log_every=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = 1000 if name == "metrics.jsonl" else 4000
    try:
        with (
            pytest.raises(OutputError, match=rf"can't write .*{name}: File too large; .* --resume"),
            open_log(run, plan, print) as log,
        ):
            log.begin(1)
            if name == "tensorboard":
                log._metrics = io.BytesIO()  # type: ignore[assignment]
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
            for report in reports:
                log.write(report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run_with_progress(run, resume=False, console=Console(quiet=True), log_every=1)  # starts over, torn lines or not
    assert [line["step"] for line in records(run)] == list(range(1, 21))
    assert [step for step, _ in logged(run)["loss/train"]] == list(range(1, 21))


def test_of_two_processes_the_first_alone_logs_and_says_what_fails(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepared(run, text, tensorboard=True, peak_tflops=0.5)
    (run / "tensorboard").write_text("in the way")
    command = ["-c", "import sys; from fbiedge.cli import main; main()", "train", "-o", str(run), "--resume"]
    first, second = finish(start(2, command))
    assert (first.code, second.code) == (2, 2)
    [error] = [line for line in (first.printed + second.printed).splitlines() if "error" in line]
    assert f"can't write {run / 'tensorboard'}: File exists; the last checkpoint is intact" in error
    (run / "tensorboard").unlink()
    first, second = finish(start(2, command))
    assert (first.code, second.code) == (0, 0), first.printed + second.printed
    assert not second.printed and "held-out" in first.printed
    assert len(list((run / "tensorboard").iterdir())) == 1
    shown = logged(run)
    assert [step for step, _ in shown["flip_flop/layer_00"]] == [line["step"] for line in records(run)] == [10, 20]
    # model FLOPs of the whole batch by the peak of both devices
    speed = shown["train/tokens_per_second"][0][1]
    flops = step_flops(Llama(model_config("column")), None, 4, 32) / (4 * 32)
    assert shown["train/mfu"][0][1] == pytest.approx(flops * speed / (2 * 0.5e12), rel=1e-5)


def test_event_files_are_read_in_the_order_they_were_written(tmp_path: Path) -> None:
    for part in range(12):
        file = EventFile(tmp_path / "tensorboard", part)
        file.write(part, {"loss": float(part)})
        file.write(part + 1, {"loss": -1.0})  # done again by the next part
        file.close()
    assert logged(tmp_path)["loss"] == [*((part, float(part)) for part in range(12)), (12, -1.0)]


def test_an_event_file_that_a_kill_cut_short_is_read_and_gone_on_from(tmp_path: Path) -> None:
    for part, torn in ((1, 7), (4, 0)):
        file = EventFile(tmp_path / "tensorboard", part)
        for step in range(part, part + 4):
            file.write(step, {"loss": float(step)})
        file.close()
        path = max((tmp_path / "tensorboard").iterdir())
        os.truncate(path, path.stat().st_size - torn)
    assert logged(tmp_path)["loss"] == [(step, float(step)) for step in range(1, 8)]


@pytest.mark.parametrize("end", [b'{"step": 3, "lo', b'{"step": 3}', b"\0" * 4096, b"\xff\n", b"[3]\n", b""])
def test_metrics_lose_a_torn_line_and_what_will_be_logged_again(end: bytes, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n' + end)
    forget_from(metrics, 4)
    assert metrics.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    forget_from(metrics, 2)
    assert metrics.read_bytes() == b'{"step": 1}\n'
    forget_from(tmp_path / "none yet", 1)
    assert (tmp_path / "none yet").read_bytes() == b""


def test_what_matters_is_shown_while_it_trains(text: Path, tmp_path: Path) -> None:
    run, printed = tmp_path / "run", io.StringIO()
    prepared(run, text, peak_tflops=1.0)
    run_with_progress(
        run, resume=False, console=Console(file=printed, width=120, force_terminal=True, color_system=None)
    )
    [*_, last] = [line for line in printed.getvalue().splitlines() if "tok/s" in line]
    for part in ("loss ", "held-out ", "MFU ", "signs flipped "):
        assert part in last
    assert "% of signs flipped" in printed.getvalue()


def test_lines_are_whole_whatever_names_and_losses_say(
    text: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, named, printed = tmp_path / "run", tmp_path / "[bold]a teacher" / "[" / "x]", io.StringIO()
    shutil.copytree(teacher, named)
    training = training_config(steps=2, eval_every=2)
    prepare_run(run, RunPlan(model=model_config("column"), training=training, teacher=str(named)), [text], [])
    monkeypatch.setattr(
        progress, "execute_run", lambda *given: (replace(report, eval_loss=800.0) for report in execute_run(*given))
    )
    run_with_progress(run, resume=False, console=Console(file=printed, width=40))
    lines = printed.getvalue().splitlines()
    assert any(f"distilled from {named}; 2 steps of 4 x 32 tokens" in line for line in lines)
    assert any("held-out 800.000 nats/token (perplexity inf)" in line for line in lines)
