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
from .run import COLUMN_SHARED, RunPlan, prepare_run

STOPPED = 130  # the exit code of a run that Ctrl-C or SIGTERM stopped
# Where the options don't say; others are the same for both.
FROM_SCRATCH = TrainConfig(steps=1000)
FINE_TUNE = TrainConfig(steps=500, learning_rate=1e-4, warmup_steps=20)

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
        str,
        typer.Option(
            "--scaling-pattern",
            "--scaling",
            help="column, column-shared (exact in GGUF), row, single, block; none: full precision (a teacher).",
        ),
    ] = "column",
    init: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to start from, moved into the scaling wanted: a short fine-tune by default."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; by default trained on the data.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Pieces of the tokenizer; by default the teacher's, else the preset's.")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja chat template to ship with the model.")] = None,
    special_token: Annotated[list[str] | None, typer.Option(help="Marker kept whole by a new tokenizer.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; 1000, with --init 500.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak, after the warm-up; 3e-4, with --init 1e-4.")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of linear warm-up; 100, with --init 20.")] = None,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on every parameter.")] = 0.1,
    grad_clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    one_hot_share: Annotated[
        float,
        typer.Option(help="Share of the next-token loss beside distillation: 0 as published, 1 ignores the teacher."),
    ] = 0.0,
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
    if resume and init is not None:
        raise UsageError("--resume goes on from OUT's own weights; leave --init out")
    if not resume:
        if not data:
            raise UsageError("no --data given; name at least one text file")
        if config is not None and preset_name is not None:
            raise UsageError("--preset and --config both give the model's shape; leave one out")
        brought = teacher is not None or (init is not None and (init / "tokenizer.json").exists())
        if (brought and tokenizer is not None) or ((teacher or init) and special_token):
            whose = "a student uses its teacher's tokenizer" if teacher else "--init brings its tokenizer along"
            raise UsageError(f"{whose}; leave --tokenizer and --special-token out")
        if init is not None and (config is not None or preset_name is not None):
            raise UsageError("--init gives the model's shape; leave --preset and --config out")
        patterns = (*get_args(ScalingPattern), COLUMN_SHARED)
        if scaling_pattern not in patterns:
            raise UsageError(f"unknown scaling pattern {scaling_pattern!r}; expected one of {', '.join(patterns)}")
        if (out / "run.json").exists():
            raise UsageError(f"{out} holds a run already; add --resume to go on with it, or choose another folder")
        shape = _shape(preset_name, config) if init is None else open_checkpoint(init).config
        pattern = "column" if scaling_pattern == COLUMN_SHARED else scaling_pattern
        model = dataclasses.replace(shape, scaling_pattern=cast(ScalingPattern, pattern))
        if teacher is not None and init is None and vocab_size is None:
            vocab_size = open_checkpoint(teacher).config.vocab_size
        if vocab_size is not None:
            model = dataclasses.replace(model, vocab_size=vocab_size)
        if sequence_length > model.max_position_embeddings:
            raise UsageError(
                f"sequences of {sequence_length} tokens are longer than the model's {model.max_position_embeddings} positions"
            )
        usual = FROM_SCRATCH if init is None else FINE_TUNE
        training = TrainConfig(
            steps=usual.steps if steps is None else steps,
            learning_rate=usual.learning_rate if learning_rate is None else learning_rate,
            warmup_steps=usual.warmup_steps if warmup_steps is None else warmup_steps,
            batch_size=batch_size, sequence_length=sequence_length, weight_decay=weight_decay, grad_clip=grad_clip,
            one_hot_share=one_hot_share, seed=seed, bf16=bf16, compile=compile_model, checkpoint_every=checkpoint_every, eval_every=eval_every,
        )  # fmt: skip
        plan = RunPlan(
            model=model, training=training, teacher=None if teacher is None else str(teacher.resolve()),
            init=None if init is None else str(init.resolve()), shared_scales=scaling_pattern == COLUMN_SHARED,
        )  # fmt: skip
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
    plan = RunPlan.load(out)
    if plan.shared_scales:
        console.print("scales of o_proj and down_proj are stored rounded to fp16, so that GGUF holds them exactly")
        console.print(f"next: fbiedge export {out / 'model'} --to gguf -o model.gguf", soft_wrap=True)
    elif plan.model.scaling_pattern == "none":
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
