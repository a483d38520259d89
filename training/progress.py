"""How training looks in a terminal: the only module of `training/` that prints."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fbiedge.evaluation import perplexity_of

from .loggers import open_log
from .model import Llama
from .parallel import agreed, is_first
from .run import RunPlan, execute_run
from .state import saved_states
from .trainer import LOG_EVERY, StepReport


def run_with_progress(run: Path, resume: bool, console: Console, log_every: int = LOG_EVERY) -> StepReport | None:
    """Execute a prepared run, showing how it goes; returns the last report, None if nothing was left to do.

    Of several processes only the first shows anything and logs: each `log_every`th step, and those that evaluate.
    """
    if not is_first():
        console = Console(quiet=True)
    # A line stays one in a log, and [brackets] in names stay.
    say = partial(console.print, soft_wrap=True, markup=False)
    total = RunPlan.load(run).training.steps
    log, report = None, None
    with ExitStack() as stack:
        with agreed():
            if is_first() and not (resume and _steps_done(run) >= total):
                log = stack.enter_context(open_log(run, RunPlan.load(run), partial(say, "warning:")))
        stop = stack.enter_context(stop_requests())
        progress = stack.enter_context(TrainingProgress(console, total))
        reports = execute_run(run, resume, lambda model, plan: say(_headline(model, plan)), stop, log_every)
        for number, report in enumerate(reports):
            if number == 0:
                with agreed():  # what fails in the first process, which writes, is said by it and ends all
                    if log is not None:
                        log.begin(report.step)
            progress.show(report)
            if report.eval_loss is not None:
                say(_evaluation_line(report))
            if report.step % log_every == 0 or report.eval_loss is not None:
                with agreed():
                    if log is not None:
                        log.write(report)
    if report is not None and report.step < total:
        say(f"stopped after step {report.step} of {total}, all saved; go on with --resume")
    return report


class TrainingProgress(Progress):
    """A bar with the steps, and beneath it the numbers that tell whether the run goes well."""

    def __init__(self, console: Console, total: int) -> None:
        self._numbers = Text()
        self._held_out: float | None = None
        self._flip_flop: float | None = None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, TimeRemainingColumn(), console=console)
        self._steps = self.add_task("training", total=total)

    def show(self, report: StepReport) -> None:
        """The numbers of this step; of those that only some steps have, the last ones."""
        self._held_out = self._held_out if report.eval_loss is None else report.eval_loss
        self._flip_flop = self._flip_flop if report.flip_flop is None else report.flip_flop
        shown = [f"loss {report.loss:.3f}"]
        if self._held_out is not None:
            shown.append(f"held-out {self._held_out:.3f}")
        shown.append(f"{report.tokens_per_second:,.0f} tok/s")
        if report.mfu is not None:
            shown.append(f"MFU {100 * report.mfu:.1f} %")
        if self._flip_flop is not None:
            shown.append(f"signs flipped {_percent(self._flip_flop)}")
        self._numbers = Text(" · ".join(shown))
        if not self.tasks[0].completed:
            self.reset(self._steps, completed=report.step - 1)  # steps of an earlier part took none of this one's time
        self.update(self._steps, completed=report.step)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self._numbers:
            yield self._numbers


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


def _headline(model: Llama, plan: RunPlan) -> str:
    count = sum(p.numel() for p in model.parameters())
    goal = "next-token loss"
    if plan.teacher:
        goal = f"distilled from {plan.teacher}"
    elif plan.model.scaling_pattern != "none":
        goal += " (not distilled: no --teacher)"
    if plan.init:
        goal += f", starting from {plan.init}"
    return (
        f"{count / 1e6:.1f}M parameters, scaling {plan.scaling}, {goal}; "
        f"{plan.training.steps} steps of {plan.training.batch_size} x {plan.training.sequence_length} tokens"
    )


def _evaluation_line(report: StepReport) -> str:
    assert report.eval_loss is not None
    flipped = "" if report.flip_flop is None else f", {_percent(report.flip_flop)} of signs flipped"
    return (
        f"step {report.step}: loss {report.loss:.3f}, held-out {report.eval_loss:.3f} nats/token "
        f"(perplexity {perplexity_of(report.eval_loss):.2f}){flipped}, {report.tokens / 1e6:.2f}M tokens"
    )


def _percent(share: float) -> str:
    """With two digits that say something, down to a ten-thousandth of a percent."""
    return f"{100 * share:.4f} %" if share < 0.0005 else f"{100 * share:.2f} %"


def _steps_done(run: Path) -> int:
    """As the newest state says; 0 for those of earlier versions, whose steps are inside."""
    states = saved_states(run)
    return int(states[-1].name) if states else 0
