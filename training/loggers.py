"""What a run writes down while it trains: RUN/metrics.jsonl always, TensorBoard and Weights & Biases where it was asked to.

Steps that a resumed run does again are not there twice: metrics.jsonl forgets them, TensorBoard is told to (it drops what
earlier files say from a step on), and Weights & Biases, online, ignores a step that it has already.

Only the first process of a training has a Log.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fbiedge.cli_support import extra
from fbiedge.errors import OutputError, UsageError

from .plan import RunPlan
from .trainer import StepReport


def require_packages(plan: RunPlan) -> None:
    """Raises UsageError where something that the plan wants isn't installed."""
    if plan.tensorboard:
        with extra("tensorboard"):
            importlib.import_module("tensorboard.summary.writer.record_writer")
    if plan.wandb is not None:
        try:
            importlib.import_module("wandb")
        except ImportError as error:
            raise UsageError("--wandb needs wandb, which isn't installed: pip install wandb") from error


def scalars(report: StepReport) -> dict[str, float]:
    """A report as named numbers, those that it has."""
    named = {
        "loss/train": report.loss,
        "loss/one_hot": report.one_hot_loss,
        "loss/distillation": report.distillation_loss,
        "loss/held_out": report.eval_loss,
        "train/learning_rate": report.learning_rate,
        "train/grad_norm": report.grad_norm,
        "train/tokens": report.tokens,
        "train/tokens_per_second": report.tokens_per_second,
        "train/mfu": report.mfu,
        "flip_flop/all": report.flip_flop,
    }
    for number, layer in enumerate(report.layers or ()):
        named |= {f"{name}/layer_{number:02}": value for name, value in asdict(layer).items()}
    return {name: float(value) for name, value in named.items() if value is not None}


@contextmanager
def open_log(run: Path, plan: RunPlan, warn: Callable[[str], object]) -> Iterator[Log]:
    """A Log for a training that goes on inside. Raises UsageError for a package or a service that isn't there.

    Weights & Biases is asked at once, as it may ask the user to log in; should it fail later, `warn` says so once, and
    the run goes on without.
    """
    require_packages(plan)
    with ExitStack() as files:
        log = Log(run, plan.tensorboard, None if plan.wandb is None else _start_wandb(run, plan), files, warn)
        try:
            yield log
        except BaseException:
            log.finish(exit_code=1)
            raise
        log.finish(exit_code=0)


class Log:
    """Writes reports to all that a plan names. Raises OutputError where a file can't be written."""

    def __init__(
        self, run: Path, tensorboard: bool, wandb: Any, files: ExitStack, warn: Callable[[str], object]
    ) -> None:
        self.run, self.warn = run, warn
        self._wants_events, self._wandb, self._files = tensorboard, wandb, files
        self._metrics: _AtOnce | None = None
        self._events: EventFile | None = None

    def begin(self, step: int) -> None:
        """The next report is that of `step`: what an earlier attempt logged from there on is forgotten."""
        with _writing(self.run / "metrics.jsonl"):
            forget_from(self.run / "metrics.jsonl", step)
            self._metrics = self._files.enter_context(_AtOnce(self.run / "metrics.jsonl", "ab"))
        if self._wants_events:
            with _writing(self.run / "tensorboard"):
                self._events = EventFile(self.run / "tensorboard", step)
                self._files.callback(self._events.close)

    def write(self, report: StepReport) -> None:
        assert self._metrics is not None, "begin() comes first"
        with _writing(self.run / "metrics.jsonl"):
            self._metrics.write(json.dumps(asdict(report)).encode() + b"\n")
        if self._events is not None:
            with _writing(self.run / "tensorboard"):
                self._events.write(report.step, scalars(report))
        if self._wandb is not None:
            with self._forgiving():
                self._wandb.log(scalars(report), step=report.step)

    def finish(self, exit_code: int) -> None:
        """Send what Weights & Biases hasn't sent yet."""
        if self._wandb is not None:
            with self._forgiving():
                self._wandb.finish(exit_code=exit_code)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- whatever its client, its service and the network find
            self._wandb = None
            self.warn(f"Weights & Biases fails, and is left out from here on: {_line(error)}")


class EventFile:
    """A file of TensorBoard's in `folder`, written at once and not, as its own writer does, by a thread that fails unseen.

    purge_step: what the files before say of this step and later ones is not shown.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        self._events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        records: Any = importlib.import_module("tensorboard.summary.writer.record_writer")
        folder.mkdir(parents=True, exist_ok=True)
        found = (re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in folder.iterdir())
        number = 1 + max(
            (int(name[1]) for name in found if name), default=0
        )  # they are read in the order of their names
        name = f"events.out.tfevents.{number:05}.{platform.node() or 'host'}.{os.getpid()}"
        self._file = _AtOnce(folder / name, "xb")
        self._records = records.RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        started = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=purge_step, session_log=started)

    def write(self, step: int, values: dict[str, float]) -> None:
        named = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summaries.Summary(value=named))

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())


class _AtOnce(io.FileIO):
    """A file without a buffer, whose rest would fail a second time when it is closed."""

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest:  # a disk that is nearly full takes a part, and says what is wrong when it is asked again
            rest = rest[super().write(rest) or 0 :]
        return len(data)


def forget_from(path: Path, step: int) -> None:
    """Cut off what an interrupted run logged at `step` and after it, a torn last line included: it will be logged again.

    In place and a line at a time: the log of a long run is large, and a full disk must not keep it from going on.
    """
    kept = 0
    with path.open("ab+") as file:
        file.seek(0)
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
                    break
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            kept += len(line)
        file.truncate(kept)


def _start_wandb(run: Path, plan: RunPlan) -> Any:
    """A run of Weights & Biases, the same one for all parts of ours. Its own environment variables are honoured."""
    wandb: Any = importlib.import_module("wandb")
    try:
        return wandb.init(
            project=plan.wandb, id=plan.wandb_run, resume="allow", config=plan.to_dict(),
            name=os.environ.get("WANDB_NAME", run.resolve().name), dir=os.environ.get("WANDB_DIR", str(run)),
            settings={"console": "off"},  # it would store each picture of the progress bar
        )  # fmt: skip
    except Exception as error:  # of the network, its service and its settings
        raise UsageError(
            f"Weights & Biases can't start: {_line(error).rstrip('.')}; see to that, or set WANDB_MODE=offline, and go on "
            "with --resume"
        ) from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"can't write {path}: {reason}; the last checkpoint is intact, go on with --resume"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
