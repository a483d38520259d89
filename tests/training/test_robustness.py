"""What may happen to a long training: killed, asked to stop, a full disk, a lost process, a loss that is no number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import train_worker
from support.processes import finish, free_port, start
from support.tiny_run import model_config, training_config

from fbiedge.errors import UsageError
from fbiedge.training import cli
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.training.state import saved_states
from fbiedge.weights import open_checkpoint

LAUNCH = Path(__file__).resolve().parents[2] / "training" / "launch"


def prepare(run: Path, text: Path, **changes: Any) -> Path:
    training = training_config(**{"steps": 12, "checkpoint_every": 1, "eval_every": 100, **changes})
    prepare_run(run, RunPlan(model=model_config("column"), training=training, teacher=None), [text], [])
    return run


def losses(printed: str) -> dict[int, float]:
    records = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    return {record["step"]: record["loss"] for record in records}


def wait_for_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.startswith("{"):
            return line
    raise AssertionError("it ended before its first step")


@pytest.mark.parametrize("in_background", [False, True])
def test_kill_9_costs_no_checkpoint_and_repeats_no_other_loss(in_background: bool, text: Path, tmp_path: Path) -> None:
    """Saving takes most of the time of these runs, so that is where most kills hit."""
    run = prepare(tmp_path / "run", text, steps=20, async_checkpoint=in_background)
    shutil.copytree(run, tmp_path / "straight")
    straight = {report.step: report.loss for report in execute_run(tmp_path / "straight")}
    seen: dict[int, float] = {}
    for patience in (0.0, 0.06):
        [process] = start(1, [train_worker.__file__, f"{run}:resume"])
        line = wait_for_line(process)
        time.sleep(patience)
        process.kill()
        seen |= losses(line + finish([process])[0].printed)
        states = saved_states(run)  # a reported step was saved before; in the background, the one before it
        assert (int(states[-1].name) if states else 0) >= max(seen) - in_background
    seen |= {report.step: report.loss for report in execute_run(run, resume=True)}
    assert all(seen[step] == straight[step] for step in seen) and max(seen) == 20
    assert len(saved_states(run)) == 2 and len(list((run / "state").iterdir())) == 2


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on_exactly(text: Path, tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", text, steps=1000)
    first, second = start(2, [train_worker.__file__, str(run)])
    wait_for_line(first)
    second.kill()
    began = time.monotonic()
    survivor, _ = finish([first, second])
    assert time.monotonic() - began < 120  # it waits for nothing: gloo alone would give up after 30 minutes
    assert survivor.code == 2 and survivor.printed.count("error: ") == 1 and "Traceback" not in survivor.printed
    assert "process 0 of 2 ends, because another one ended" in survivor.printed
    at = int(saved_states(run)[-1].name)
    resumed = execute_run(run, resume=True)
    assert [next(resumed).step for _ in range(3)] == [at + 1, at + 2, at + 3]


def test_a_loss_that_is_no_number_ends_all_with_one_message(text: Path, tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", text, learning_rate=1e20, checkpoint_every=100)
    first, second = finish(start(2, [train_worker.__file__, str(run)]))
    assert (first.code, second.code) == (2, 2)
    assert first.printed.count("error: step ") == 1 and "lower learning rate" in first.printed
    assert "error" not in second.printed and "Traceback" not in first.printed + second.printed
    assert not saved_states(run)


def test_a_full_disk_ends_all_with_one_message_and_the_last_state_is_intact(text: Path, tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", text, checkpoint_every=4)
    first, second = finish(start(2, [train_worker.__file__, f"{run}:to=4", f"{run}:resume:limit=20000"]))
    assert (first.code, second.code) == (2, 2)
    assert "state/00000008: File too large; the state of step 4 is intact" in first.printed.replace("\n", " ")
    assert "error" not in second.printed and "Traceback" not in first.printed + second.printed
    assert [path.name for path in (run / "state").iterdir()] == ["00000004"]
    assert open_checkpoint(run / "model")
    assert [report.step for report in execute_run(run, resume=True)] == list(range(5, 13))


def train_command(text: Path, shape: Path, run: Path) -> list[str]:
    shape.write_text(json.dumps(model_config("column").to_dict()))
    return ["train", "--data", str(text), "--config", str(shape), "-o", str(run), "--sequence-length", "32",
            "--batch-size", "4", "--eval-every", "100000"]  # fmt: skip


def test_sigterm_to_one_process_saves_and_ends_all_with_130(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = train_command(text, tmp_path / "config.json", run)
    command += ["--steps", "100000", "--checkpoint-every", "100000"]
    entry = ["-c", "import sys; from fbiedge.cli import main; main()"]
    processes = start(2, [*entry, *command])
    deadline = time.monotonic() + 600
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish(processes)
    assert (first.code, second.code) == (130, 130), first.printed + second.printed
    assert "go on with --resume" in first.printed.replace("\n", " ") and not second.printed
    assert len(saved_states(run)) == 1 and open_checkpoint(run / "model")
    with pytest.raises(UsageError, match="holds a run already; add --resume"):
        cli.main(command[1:])


def test_what_no_process_can_do_is_said_once_and_before_data_are_prepared(text: Path, tmp_path: Path) -> None:
    # A thread of gloo's would now and then abort an interpreter that is taken apart, so none is.
    entry = ["-c", "import atexit; from fbiedge.cli import main; atexit.register(print, 'taken apart'); main()"]
    command = train_command(text, tmp_path / "config.json", tmp_path / "run")
    for arguments, message in (
        (["train", "--resume", "-o", str(tmp_path / "none")], "no run to resume"),
        ([*command, "--batch-size", "3"], "a batch of 3 sequences can't be shared by 2 processes"),
    ):
        first, second = finish(start(2, [*entry, *arguments]))
        assert (first.code, second.code) == (2, 2)
        assert message in first.printed.replace("\n", " ") and "taken apart" not in first.printed and not second.printed
        assert not (tmp_path / "run").exists()


def test_launch_files_are_sound() -> None:
    for file in LAUNCH.glob("*.sh"):
        subprocess.run(["bash", "-n", file], check=True)
        assert os.access(file, os.X_OK)


def test_two_nodes_of_two_processes_on_this_machine(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*train_command(text, tmp_path / "config.json", run)[1:], "--steps", "3"]
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "NODES": "2", "PROCESSES": "2", "HEAD": f"127.0.0.1:{free_port()}",
    }  # fmt: skip
    nodes = [
        subprocess.Popen(
            [LAUNCH / "multi_node.sh", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment,
        )
        for _ in range(2)
    ]  # fmt: skip
    ended = finish(nodes)
    assert [node.code for node in ended] == [0, 0], [node.printed for node in ended]
    assert sum("checkpoint: " in node.printed for node in ended) == 1
    assert len(list(saved_states(run)[-1].glob("*.distcp"))) == 4
    assert open_checkpoint(run / "model")
