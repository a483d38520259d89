"""The paper's questions at a small scale: every run and every figure of RESULTS.md, in one command.

    python -m fbiedge.training.experiments --data DATA --recipe RUNS -o OUT [--results training/results]

DATA and RUNS are those of default_model.py; its teacher is trained first where RUNS has none. All runs share body,
teacher, data order, schedule and tokens, and differ in what they are named for. Interrupted, the same command goes on
where it stopped; `--only NAME` makes one of them, so that two processes can share the work.

Held-out losses are those of all windows of the held-out stories, in fp32. Runs are compared window by window with the
published form: the interval is that of the mean difference (95 %, bootstrap over windows), and says nothing of another
seed, for which `column, another seed` is there.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from fbiedge.config import ScalingPattern, preset
from fbiedge.errors import FbiEdgeError, UsageError
from fbiedge.files import atomic_file

from . import default_model
from .checkpoint import load_model
from .config import TrainConfig
from .evaluation import text_tokens, window_losses
from .history import History, read_histories
from .plan import RunPlan
from .plots import Panel, plot_panels, save
from .prepare import prepare_run
from .tokenizer import read_tokenizer

MODEL = replace(preset("small"), num_hidden_layers=4, max_position_embeddings=256)
TRAINING = TrainConfig(
    steps=250, batch_size=16, sequence_length=256, learning_rate=2e-3, warmup_steps=50, checkpoint_every=50,
    eval_every=50, compile=True,
)  # fmt: skip
HELD_OUT = "text/held_out_stories.txt"
BASE = "column"  # as published: from random latents, distillation alone
_RESAMPLES = 2000


# Runs that answer a question together; the first is what the others are compared with.
QUESTIONS = {
    "a": (BASE, "one-hot targets"),
    "b": (BASE, "pretrained start"),
    "c": (BASE, "full precision"),
    "d": (BASE, "row", "block", "column-shared"),
    "seed": (BASE, "column, another seed"),
}


def plans(out: Path, teacher: Path) -> dict[str, RunPlan]:
    """Every run by its name, in an order in which each finds the model that it starts from."""
    guide = str(teacher.resolve())

    def run(pattern: ScalingPattern, *, distil: bool = True, seed: int = TRAINING.seed, **more: Any) -> RunPlan:
        model, training = replace(MODEL, scaling_pattern=pattern), replace(TRAINING, seed=seed)
        return RunPlan(model=model, training=training, teacher=guide if distil else None, **more)

    return {
        BASE: run("column"),
        "one-hot targets": run("column", distil=False),
        "full precision": run("none"),
        "pretrained start": run("column", init=str((folder(out, "full precision") / "model").resolve())),
        "column-shared": run("column", shared_scales=True),
        "block": run("block"),
        "row": run("row"),
        "column, another seed": run("column", seed=TRAINING.seed + 1),
    }


def folder(out: Path, name: str) -> Path:
    """The folder of a run."""
    return out / name.replace(",", "").replace(" ", "-")


def difference(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of b - a over paired windows, and the bounds of its 95 % interval."""
    apart = b - a
    drawn = np.random.default_rng(0).integers(0, len(apart), (_RESAMPLES, len(apart)))
    low, high = np.quantile(apart[drawn].mean(1), [0.025, 0.975])
    return float(apart.mean()), float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One logged step of a run; null what that step doesn't tell."""

    run: str
    step: int
    tokens: int
    held_out: float | None  # nats per token, of the windows that the run itself looks at
    flip_flop: float | None  # share of all binary weights whose sign the step changed


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run in the table of one question; losses in nats per token."""

    question: str
    run: str
    tokens: int
    held_out: float
    difference: float  # to the question's first run
    low: float
    high: float


def compare(losses: Mapping[str, npt.NDArray[np.float64]], tokens: int) -> list[Row]:
    """The tables of all questions whose runs are there."""
    rows = []
    for key, names in QUESTIONS.items():
        for name in names:
            apart, low, high = difference(losses[names[0]], losses[name])
            rows.append(
                Row(question=key, run=name, tokens=tokens, held_out=float(losses[name].mean()), difference=apart,
                    low=low, high=high)
            )  # fmt: skip
    return rows


def curve(name: str, history: History) -> list[Point]:
    """What a run logged."""
    held_out, flips = (dict(zip(*known, strict=True)) for known in (history.known("eval_loss"), history.flip_flop()))
    steps = zip(history.columns["step"], history.columns["tokens"], strict=True)
    return [
        Point(run=name, step=int(step), tokens=int(tokens), held_out=held_out.get(tokens), flip_flop=flips.get(tokens))
        for step, tokens in steps
    ]


def write_csv(path: Path, rows: Sequence[Row] | Sequence[Point], digits: str) -> None:
    """The rows as a table, whole or not at all."""
    records = [
        {name: f"{value:{digits}}" if isinstance(value, float) else value for name, value in asdict(row).items()}
        for row in rows
    ]
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(records)


def draw(out: Path, histories: Mapping[str, History]) -> None:
    """For each question the held-out loss of its runs over the tokens they saw, and how many signs still change."""
    for key, names in QUESTIONS.items():
        runs = {name: histories[name] for name in names}
        losses = {name: history.known("eval_loss") for name, history in runs.items()}
        panels = [Panel(y_label="held-out loss (nats/token)", series=losses, dots=True, height=3.4)]
        flips = {name: history.flip_flop() for name, history in runs.items()}
        binary = {name: (tokens, 100 * shares) for name, (tokens, shares) in flips.items() if len(tokens)}
        if len(binary) > 1:
            panels.append(Panel(y_label="signs changed in a step (%)", series=binary, log_y=True, height=2.4))
        save(plot_panels(panels), out / f"{key}.png")


def execute(name: str, plan: RunPlan, recipe: Path, teacher: Path, out: Path, console: Console) -> None:
    """Train one run, or what is left of it. Raises typer.Exit where Ctrl-C stopped it."""

    def prepare(run: Path) -> None:
        tokenizer = teacher / "tokenizer.json" if plan.teacher is None else None
        prepare_run(run, plan, [recipe / "text" / "train.txt"], [recipe / HELD_OUT], tokenizer)

    default_model.train_or_resume(name, folder(out, name), plan, prepare, console)


def held_out(names: Iterable[str], recipe: Path, teacher: Path, out: Path) -> dict[str, npt.NDArray[np.float64]]:
    """The losses of each finished run, window by window."""
    tokenizer = read_tokenizer(teacher / "tokenizer.json")
    tokens = text_tokens(recipe / HELD_OUT, tokenizer, MODEL, out / "held_out.tokens")
    return {name: window_losses(load_model(folder(out, name) / "model"), tokens) for name in names}


def main(
    data: Annotated[Path, typer.Option(help="Folder with the corpora of the bundled model.")],
    recipe: Annotated[
        Path, typer.Option(help="Folder with the runs of the bundled model, of which the teacher is used.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs.")],
    results: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("training/results"),
    only: Annotated[
        list[str] | None, typer.Option(help="Train this run alone and write no results; repeat for more.")
    ] = None,
) -> None:
    """Train all runs, compare them on held-out text, and write tables and figures."""
    console = Console(markup=False)
    default_model.check_corpora(data)
    default_model.run_stage("teacher", default_model.stages(recipe)["teacher"], data, recipe, console)
    teacher = recipe / "teacher" / "model"
    wanted = plans(out, teacher)
    if unknown := sorted(set(only or ()) - wanted.keys()):
        raise UsageError(f"unknown run {unknown[0]!r}; expected one of {', '.join(wanted)}")
    for name, plan in wanted.items():
        if only is None or name in only:
            execute(name, plan, recipe, teacher, out, console)
    if only is None:
        losses = held_out(wanted, recipe, teacher, out)
        rows = compare(losses, TRAINING.steps * TRAINING.batch_size * TRAINING.sequence_length)
        results.mkdir(parents=True, exist_ok=True)
        histories = dict(zip(wanted, read_histories([folder(out, name) for name in wanted]), strict=True))
        write_csv(results / "held_out.csv", rows, ".4f")
        write_csv(
            results / "curves.csv", [p for name, history in histories.items() for p in curve(name, history)], ".6g"
        )
        draw(results, histories)
        for row in rows:
            console.print(
                f"{row.question:4} {row.run:32} {row.held_out:.4f}  {row.difference:+.4f} ({row.low:+.4f} to {row.high:+.4f})"
            )


if __name__ == "__main__":
    try:
        typer.run(main)
    except FbiEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
