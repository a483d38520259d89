"""`fbiedge train`: options -> RunPlan -> a run with progress. Mounted by fbiedge.cli, so that torch loads only here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console

from fbiedge.config import ModelConfig, ScalingPattern, preset
from fbiedge.errors import UsageError
from fbiedge.weights import open_checkpoint

from .config import TrainConfig
from .progress import run_with_progress
from .run import RunPlan, prepare_run

STOPPED = 130  # the exit code of a run that Ctrl-C or SIGTERM stopped

app = typer.Typer(add_completion=False)


@app.command()
def train(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run; the checkpoint is written to OUT/model.")
    ],
    data: Annotated[list[Path] | None, typer.Option(help="UTF-8 text file; repeat for more.")] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="Text for the held-out loss; by default every 50th document of the data.")
    ] = None,
    preset_name: Annotated[
        str | None, typer.Option("--preset", help="Shape of the model: tiny (default), 130m, 1.3b, 7b, 13b.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json with the model's shape, instead of a preset.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Full-precision checkpoint to distil from; its tokenizer is used.")
    ] = None,
    scaling_pattern: Annotated[
        str, typer.Option(help="column, row, single, block; none trains a full-precision model (a teacher).")
    ] = "column",
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; by default trained on the data.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Pieces of the tokenizer; by default the teacher's, else the preset's.")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja chat template to ship with the model.")] = None,
    special_token: Annotated[list[str] | None, typer.Option(help="Marker kept whole by a new tokenizer.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Peak, after the warm-up.")] = 3e-4,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on every parameter.")] = 0.1,
    grad_clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides the start and the order of the data.")] = 11111,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast.")] = True,
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile both models.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between saves.")] = 200,
    eval_every: Annotated[int, typer.Option(help="Steps between held-out losses.")] = 200,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUT's last save, with OUT's own options.")
    ] = False,
) -> None:
    """Train a binarized Llama by distillation from a --teacher (without one: on the next token), or a full-precision
    teacher (--scaling-pattern none)."""
    console = Console()
    if not resume:
        if not data:
            raise UsageError("no --data given; name at least one text file")
        if config is not None and preset_name is not None:
            raise UsageError("--preset and --config both give the model's shape; leave one out")
        if teacher is not None and (tokenizer is not None or special_token):
            raise UsageError("a student uses its teacher's tokenizer; leave --tokenizer and --special-token out")
        if scaling_pattern not in get_args(ScalingPattern):
            raise UsageError(
                f"unknown scaling pattern {scaling_pattern!r}; expected one of {', '.join(get_args(ScalingPattern))}"
            )
        if (out / "run.json").exists():
            raise UsageError(f"{out} holds a run already; add --resume to go on with it, or choose another folder")
        model = dataclasses.replace(_shape(preset_name, config), scaling_pattern=cast(ScalingPattern, scaling_pattern))
        if teacher is not None and vocab_size is None:
            vocab_size = open_checkpoint(teacher).config.vocab_size
        if vocab_size is not None:
            model = dataclasses.replace(model, vocab_size=vocab_size)
        if sequence_length > model.max_position_embeddings:
            raise UsageError(
                f"sequences of {sequence_length} tokens are longer than the model's {model.max_position_embeddings} positions"
            )
        training = TrainConfig(
            steps=steps, batch_size=batch_size, sequence_length=sequence_length, learning_rate=learning_rate,
            warmup_steps=warmup_steps, weight_decay=weight_decay, grad_clip=grad_clip, seed=seed, bf16=bf16,
            compile=compile_model, checkpoint_every=checkpoint_every, eval_every=eval_every,
        )  # fmt: skip
        plan = RunPlan(model=model, training=training, teacher=None if teacher is None else str(teacher.resolve()))
        console.print("preparing tokenizer and token shards")
        prepare_run(
            out, plan, data, held_out or [], tokenizer, tuple(special_token or ()),
            None if chat_template is None else _read(chat_template),
        )  # fmt: skip
    report = run_with_progress(out, resume, console)
    if report is None:
        console.print("nothing left to do: the run is complete")
    elif report.step < RunPlan.load(out).training.steps:
        raise typer.Exit(STOPPED)
    console.print(f"checkpoint: {out / 'model'}", soft_wrap=True)
    if RunPlan.load(out).model.scaling_pattern == "none":
        console.print(f"next: fbiedge train --teacher {out / 'model'} --data ... -o STUDENT", soft_wrap=True)
    else:
        console.print(f"next: fbiedge export {out / 'model'} --to onnx -o model.onnx", soft_wrap=True)


def _shape(preset_name: str | None, config: Path | None) -> ModelConfig:
    if config is None:
        return preset(preset_name or "tiny")
    try:
        raw: dict[str, Any] = json.loads(_read(config))
    except ValueError as error:
        raise UsageError(f"{config}: not JSON ({error})") from error
    return ModelConfig.from_dict(raw)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read {path}: {error}") from error


def main(args: list[str]) -> int:
    """Run `fbiedge train ARGS` -> exit code: 0, or STOPPED. Raises FbiEdgeError."""
    try:
        code = app(args=args, prog_name="fbiedge train", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors, whichever copy of click it uses
            raise
        raise UsageError(f"{error.format_message()} (see fbiedge train --help)") from error
    return code if isinstance(code, int) else 0
