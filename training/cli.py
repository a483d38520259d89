"""`fbiedge train`: options -> RunPlan -> a run with progress. Mounted by fbiedge.cli, so that torch loads only here."""

from __future__ import annotations

import dataclasses
import json
import secrets
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console

from fbiedge.config import ModelConfig, ScalingPattern, preset
from fbiedge.errors import UsageError
from fbiedge.weights import open_checkpoint

from .corpus import DataOptions, numbers
from .loggers import require_packages
from .parallel import agreed, is_first, joined, spoken_by_first, team
from .plan import COLUMN_SHARED, RunPlan, TeacherDtype
from .prepare import prepare_run
from .progress import run_with_progress
from .recipes import resolved
from .teacher import find_teacher, fitted, teacher_facts

# Hyperparameters that a resumed run may have otherwise, and options that only say how it is watched.
MAY_CHANGE = (
    "learning_rate", "min_learning_rate_ratio", "grad_clip", "micro_batch_size", "activation_checkpointing", "compile",
    "loss_chunk", "loss_jump", "loss_jump_steps", "checkpoint_every", "async_checkpoint", "eval_every", "eval_sequences",
)  # fmt: skip
WATCHING = ("--tensorboard", "--wandb", "--peak-tflops")
STOPPED = 130  # the exit code of a run that Ctrl-C or SIGTERM stopped

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def train(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run; the checkpoint is written to OUT/model.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text or JSONL file, folder of Amber chunks, of such files or of token shards, Hugging Face dataset "
            "(folder, or hf:NAME[@CONFIG][:SPLIT]); repeat for more."
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Data for the held-out loss; by default a small part of the data.")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Field of the text in JSONL and datasets; by default text, or the only one.")
    ] = None,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave corrupt lines of JSONL out, and count them.")
    ] = False,
    skip_chunks: Annotated[
        str | None, typer.Option(help="Amber chunks of a folder to leave out, such as 7,12; by default the preset's.")
    ] = None,
    data_tokens: Annotated[int | None, typer.Option(help="Read only so many tokens of the data.")] = None,
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", help="Shape and hyperparameters: tiny (default), small, 130m, 1.3b, 7b, 13b."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json with the model's shape, instead of a preset.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Model to distil from: folder or name on the Hugging Face hub; its tokenizer is used."),
    ] = None,
    teacher_dtype: Annotated[
        str | None, typer.Option(help="fp32 or bf16: how its weights are held; bf16 from 130m on.")
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
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; by default trained on --data.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Pieces of the tokenizer; by default the teacher's, else the preset's.")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja chat template to ship with the model.")] = None,
    special_token: Annotated[list[str] | None, typer.Option(help="Marker kept whole by a new tokenizer.")] = None,
    # Hyperparameters: TrainConfig's names. What isn't given is the preset's.
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Sequences a process computes at once, gradients adding up; 0: its whole share.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak, after the warm-up.")] = None,
    min_learning_rate_ratio: Annotated[float | None, typer.Option(help="Of the peak, at the last step.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's, on every parameter.")] = None,
    beta1: Annotated[float | None, typer.Option(help="AdamW's.")] = None,
    beta2: Annotated[float | None, typer.Option(help="AdamW's.")] = None,
    grad_clip: Annotated[float | None, typer.Option(help="Largest gradient norm.")] = None,
    one_hot_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the next-token loss beside distillation: 0 as published; 1 learns from the text alone and only "
            "reports distillation, for which the teacher runs all the same."
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="fp32, or int8 or int4: rounded in training as that export will be.")
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(help="fp32, or int8 or int4: likewise; of a tied model the same as --head.")
    ] = None,
    loss_chunk: Annotated[int | None, typer.Option(help="Positions whose logits are held at once.")] = None,
    loss_jump: Annotated[
        float | None, typer.Option(help="Nats above the lowest loss level so far at which a run has diverged.")
    ] = None,
    loss_jump_steps: Annotated[int | None, typer.Option(help="Steps in a row that it stays there.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the start and the order of the data.")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 autocast.")] = None,
    cache_teacher: Annotated[
        bool | None,
        typer.Option(
            "--cache-teacher/--no-cache-teacher",
            help="Keep what the teacher says in OUT/teacher while the run lasts: only the first epoch waits for it.",
        ),
    ] = None,
    compile_model: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile both models.")
    ] = None,
    activation_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--activation-checkpointing/--no-activation-checkpointing",
            help="Less memory for a third more work: compute each layer again for its gradients.",
        ),
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between saves.")] = None,
    async_checkpoint: Annotated[
        bool | None,
        typer.Option("--async-checkpoint/--no-async-checkpoint", help="Save in the background, OUT/model at the end."),
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between held-out losses.")] = None,
    eval_sequences: Annotated[int | None, typer.Option(help="Held-out sequences per evaluation.")] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Log to OUT/tensorboard, too.")
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Log to this project of Weights & Biases, too.")
    ] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(help="Peak of one device, for MFU; by default by its datasheet, where it is known.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from OUT's last save, with OUT's own options, except those given that may change: how it learns "
            "(--learning-rate, --grad-clip), is computed (--micro-batch-size, --compile), saved, evaluated and watched.",
        ),
    ] = False,
) -> None:
    """Train a binarized Llama by distillation from a --teacher (without one: on the next token), or a full-precision
    teacher (--scaling-pattern none). What no option says is the preset's, else for 1000 short steps on one machine."""
    console = Console(quiet=not is_first(), markup=False)
    given = {
        "steps": steps, "batch_size": batch_size, "micro_batch_size": micro_batch_size,
        "sequence_length": sequence_length, "learning_rate": learning_rate,
        "min_learning_rate_ratio": min_learning_rate_ratio, "warmup_steps": warmup_steps,
        "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2, "grad_clip": grad_clip,
        "one_hot_share": one_hot_share, "head": head, "embedding": embedding, "loss_chunk": loss_chunk,
        "loss_jump": loss_jump, "loss_jump_steps": loss_jump_steps, "seed": seed, "bf16": bf16,
        "cache_teacher": cache_teacher, "compile": compile_model, "activation_checkpointing": activation_checkpointing,
        "checkpoint_every": checkpoint_every, "async_checkpoint": async_checkpoint, "eval_every": eval_every,
        "eval_sequences": eval_sequences,
    }  # fmt: skip
    with agreed(hours=True):
        if resume:
            may = {f"--{name.replace('_', '-')}" for name in MAY_CHANGE}
            if others := _given(context) - may - {"--out", "--resume", *WATCHING}:
                raise UsageError(f"--resume goes on with {out}'s own options; leave {' and '.join(sorted(others))} out")
            before = RunPlan.load(out)
            changes: dict[str, Any] = {name: given[name] for name in MAY_CHANGE if given[name] is not None}
            changed = dataclasses.replace(before, training=dataclasses.replace(before.training, **changes))
            changed = _watched(changed, tensorboard, wandb, peak_tflops)
            if changed != before and is_first():
                changed.save(out)
        if not resume and is_first():
            if not data:
                raise UsageError("no --data given; name a text file, or what else --help lists")
            if teacher is None:
                for option, value in (
                    ("--one-hot-share", one_hot_share), ("--teacher-dtype", teacher_dtype),
                    ("--cache-teacher", cache_teacher or None),
                ):  # fmt: skip
                    if value is not None:
                        raise UsageError(f"{option} has no effect without a --teacher; leave it out")
            if config is not None and preset_name is not None:
                raise UsageError("--preset and --config both give the model's shape; leave one out")
            teacher_folder = None if teacher is None else find_teacher(teacher).resolve()
            brought = any(
                folder is not None and (folder / "tokenizer.json").exists() for folder in (teacher_folder, init)
            )
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
            if teacher_folder is not None and init is None:
                model = fitted(model, teacher_facts(teacher_folder))
            if vocab_size is not None:
                model = dataclasses.replace(model, vocab_size=vocab_size)
            recipe, training = resolved(preset_name, init is not None, given)
            team().rows(training.batch_size)
            if training.sequence_length > model.max_position_embeddings:
                raise UsageError(
                    f"sequences of {training.sequence_length} tokens are longer than the model's {model.max_position_embeddings} positions"
                )
            plan = RunPlan(
                model=model, training=training, teacher=None if teacher_folder is None else str(teacher_folder),
                teacher_dtype=cast(TeacherDtype, teacher_dtype or recipe.teacher_dtype), preset=preset_name,
                init=None if init is None else str(init.resolve()), shared_scales=scaling_pattern == COLUMN_SHARED,
            )  # fmt: skip
            plan = _watched(plan, tensorboard, wandb, peak_tflops)
            options = DataOptions(
                text_field=text_field, skip_corrupt=skip_corrupt, most_tokens=data_tokens,
                skip_chunks=recipe.skip_chunks if skip_chunks is None else numbers(skip_chunks),
            )  # fmt: skip
            console.print("preparing tokenizer and token shards")
            told = prepare_run(
                out, plan, data, held_out or [], tokenizer, tuple(special_token or ()),
                None if chat_template is None else _read(chat_template), None, options,
            )  # fmt: skip
            console.print(told, soft_wrap=True, markup=False)
            _print_plan(RunPlan.load(out), out, console)
    report = run_with_progress(out, resume, console)
    if report is None:
        console.print("nothing left to do: the run is complete")
    elif report.step < RunPlan.load(out).training.steps:
        raise typer.Exit(STOPPED)
    console.print(f"checkpoint: {out / 'model'}", soft_wrap=True)
    plan = RunPlan.load(out)
    if plan.shared_scales:
        console.print("scales of o_proj and down_proj are stored rounded to fp16, so that GGUF holds them exactly")
        console.print(_next_export(out, "gguf"), soft_wrap=True)
    elif plan.model.scaling_pattern == "none":
        console.print(f"next: fbiedge train --teacher {out / 'model'} --data ... -o STUDENT", soft_wrap=True)
    else:
        console.print(_next_export(out, "onnx"), soft_wrap=True)


def _next_export(out: Path, to: str) -> str:
    return f"next: fbiedge export {out / 'model'} --to {to} -o model.{to}"


def _watched(plan: RunPlan, tensorboard: bool | None, wandb: str | None, peak_tflops: float | None) -> RunPlan:
    """`plan` with what was given of how it is watched. Raises UsageError where a package for it is missing."""
    changes: dict[str, Any] = {}
    if tensorboard is not None:
        changes["tensorboard"] = tensorboard
    if peak_tflops is not None:
        changes["peak_tflops"] = peak_tflops
    if wandb is not None and wandb != plan.wandb:
        changes |= {"wandb": wandb, "wandb_run": secrets.token_hex(4)}
    watched = dataclasses.replace(plan, **changes)
    if is_first():
        require_packages(watched)
    return watched


def _print_plan(plan: RunPlan, out: Path, console: Console) -> None:
    """The resolved hyperparameters, as they are stored."""
    for title, values in (("training", plan.training.to_dict()), ("model", plan.model.to_dict())):
        shown = "  ".join(f"{name}={value}" for name, value in values.items() if isinstance(value, str | int | float))
        console.print(f"{title}: {shown}", highlight=False, markup=False)
    console.print(f"all of it: {out / 'run.json'}", soft_wrap=True, markup=False)


def _given(context: typer.Context) -> set[str]:
    """The options that were typed, by their first names."""
    typed = set()
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is not None and source.name == "COMMANDLINE":
            typed.add(option.opts[0])
    return typed


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
    with joined():
        try:
            code = app(args=args, prog_name="fbiedge train", standalone_mode=False)
        except Exception as error:
            if not hasattr(error, "format_message"):  # typer's usage errors, whichever copy of click it uses
                raise
            raise spoken_by_first(UsageError(f"{error.format_message()} (see fbiedge train --help)")) from error
    return code if isinstance(code, int) else 0
