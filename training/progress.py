"""How training looks in a terminal, and RUN/metrics.jsonl: the only module of `training/` that prints."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fbiedge.files import atomic_file

from .model import Llama
from .parallel import is_first
from .run import RunPlan, execute_run
from .trainer import LOG_EVERY, StepReport


def run_with_progress(run: Path, resume: bool, console: Console, log_every: int = LOG_EVERY) -> StepReport | None:
    """Execute a prepared run, showing loss, tok/s and time left; returns the last report, None if nothing was left to do.

    Of several processes only the first shows anything and writes RUN/metrics.jsonl.
    """
    if not is_first():
        console = Console(quiet=True)

    def announce(model: Llama, plan: RunPlan) -> None:
        count = sum(p.numel() for p in model.parameters())
        goal = "next-token loss"
        if plan.teacher:
            goal = f"distilled from {plan.teacher}"
        elif plan.model.scaling_pattern != "none":
            goal += " (not distilled: no --teacher)"
        if plan.init:
            goal += f", starting from {plan.init}"
        console.print(
            f"{count / 1e6:.1f}M parameters, scaling {plan.scaling}, {goal}; "
            f"{plan.training.steps} steps of {plan.training.batch_size} x {plan.training.sequence_length} tokens"
        )

    total = RunPlan.load(run).training.steps
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    report, metrics = None, None
    with Progress(*columns, console=console) as progress, ExitStack() as files:
        task = None
        stop = files.enter_context(stop_requests())
        for report in execute_run(run, resume, announce, stop, log_every):
            if task is None:
                if is_first():
                    metrics = files.enter_context(open(_forget_from(run / "metrics.jsonl", report.step), "a"))
                task = progress.add_task("training", total=total, completed=report.step - 1)
            progress.update(
                task,
                completed=report.step,
                description=f"loss {report.loss:.3f}  {report.tokens_per_second:,.0f} tok/s",
            )
            if report.eval_loss is not None:
                console.print(
                    f"step {report.step}: loss {report.loss:.3f}, held-out {report.eval_loss:.3f} nats/token "
                    f"(perplexity {math.exp(report.eval_loss):.2f}), {report.tokens / 1e6:.2f}M tokens"
                )
            if metrics is not None and (report.step % log_every == 0 or report.eval_loss is not None):
                metrics.write(json.dumps(asdict(report)) + "\n")
                metrics.flush()
    if report is not None and report.step < total:
        console.print(f"stopped after step {report.step} of {total}, all saved; go on with --resume")
    return report


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask for a stop after the step that is under way; a second Ctrl-C doesn't wait for it."""
    asked = False

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget_from(path: Path, step: int) -> Path:
    """Drop what an interrupted run logged at `step` and after it, its torn last line included: it will be logged again."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] < step:
            kept.append(line + "\n")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept))
    return path
