"""The command `fbiedge`. Commands only fit parts together; what they need is imported when they run, so that `--help`
is quick and a device needs neither onnx nor torch."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, cli_analyze, cli_evaluate, cli_export, cli_generate, cli_serve, cli_web
from .cli_support import bundled_model, extra
from .errors import FbiEdgeError, UsageError

app = typer.Typer(
    help="Train, export and run fully binarized language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[Path | None, typer.Argument(help="model.onnx or model.gguf; default: the bundled model")]
AccuracyLevel = Annotated[str | None, typer.Option(help="activations: int8 or fp32; default: the model's")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"fbiedge {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(cli_generate.chat)
app.command()(cli_generate.generate)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="model.onnx, model.gguf or a checkpoint folder")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Show what a model is made of: architecture, scale form, bits a weight, sizes, metadata."""
    from . import inspection, tables, terminal

    found = inspection.inspect(path)
    if as_json:
        terminal.print_text(json.dumps(found.to_dict(), indent=2))
    else:
        tables.print_inspection(found)


@app.command()
def bench(
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of a prefill")] = 128,
    gen_tokens: Annotated[int, typer.Option(help="tokens decoded at each depth")] = 64,
    depth: Annotated[
        str | None, typer.Option(help="tokens in the cache before decoding; default: 0,512,1024 as far as they fit")
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(help="thread counts; by default 1 and one for each core, which is also the most that is used"),
    ] = None,
    repetitions: Annotated[int, typer.Option(help="measurements of each configuration")] = 5,
    accuracy_level: AccuracyLevel = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one line of JSON")] = False,
) -> None:
    """Measure speed, memory and load time, beside the machine's own speed of reading memory."""
    from . import tables, terminal
    from .bench import BenchOptions, BenchReport
    from .bench import bench as run

    options = BenchOptions(
        prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, depths=_numbers("depth", depth),
        threads=_numbers("threads", threads), repetitions=repetitions, accuracy_level=accuracy_level,
    )  # fmt: skip
    with terminal.progress_bar("measuring") as update:
        for event in run(model or bundled_model(), options):
            if isinstance(event, BenchReport):
                report = event
            else:
                update(event.done, event.total)
    tables.print_bench(report)
    if as_json:
        terminal.print_text(json.dumps(report.to_dict()))


@app.command()
def library(
    isa: Annotated[bool, typer.Option("--isa", help="which kernels this machine can run")] = False,
    include: Annotated[bool, typer.Option("--include", help="the folder of its C headers")] = False,
) -> None:
    """Print the path of the op library, to register in any ONNX Runtime session."""
    from . import ops_library, terminal

    if isa and include:
        raise UsageError("--isa and --include ask for different things, expected one of them")
    if include:
        terminal.print_text(str(ops_library.include_path()))
        return
    path = ops_library.library_path()
    if not isa:
        terminal.print_text(str(path))
        return
    active = ops_library.active_isa()
    for name in ops_library.available_isas():
        terminal.print_text(f"{name} (runs)" if name == active else name)


@app.command()
def init(
    preset: Annotated[str, typer.Option(help="tiny, small, 130m, 1.3b, 7b or 13b")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    scaling_pattern: Annotated[str, typer.Option(help="column, row, single or block")] = "column",
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights")] = 0,
) -> None:
    """Write a checkpoint with random weights, for tests and benchmarks."""
    from dataclasses import replace

    from . import config, terminal

    shape = config.preset(preset)
    patterns = ("column", "row", "single", "block")
    if scaling_pattern not in patterns:
        raise UsageError(f"scaling pattern is {scaling_pattern!r}, expected one of {', '.join(patterns)}")
    if seed < 0:
        raise UsageError(f"seed is {seed}, expected a whole number of at least 0")
    if (output / "config.json").exists():
        raise UsageError(
            f"{output} holds a checkpoint already, which random weights would replace; choose a new folder"
        )
    with extra("export"):
        from .initialize import init_checkpoint
    with terminal.progress_bar("writing") as update:
        init_checkpoint(replace(shape, scaling_pattern=scaling_pattern), output, seed, update)  # type: ignore[arg-type]
    terminal.print_text(f"wrote {output}")


def _require_new(output: Path) -> None:
    if (output / "config.json").exists():
        raise UsageError(f"{output} holds a checkpoint already, which would be replaced; choose a new folder")


@app.command()
def transplant(
    model: Annotated[Path, typer.Argument(help="folder of a full-precision Llama, with its tokenizer.json")],
    tokenizer: Annotated[Path, typer.Argument(help="tokenizer.json of the new vocabulary, or its folder")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
) -> None:
    """Give a full-precision model another vocabulary, to fine-tune it into a teacher for a small student."""
    from . import terminal

    with extra("export"):
        from .transplant import transplant as run
    _require_new(output)
    rows = run(model, tokenizer, output)
    rest = rows.pieces - rows.own - rows.spelled
    terminal.print_text(
        f"wrote {output}: {rows.pieces} pieces, {rows.own} with a row of the model's, {rows.spelled} spelled with several"
        + (f", {rest} with none" if rest else "")
    )


@app.command()
def widen(
    model: Annotated[Path, typer.Argument(help="checkpoint folder of a binary model")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    factor: Annotated[int, typer.Option(help="how many copies of every unit and head")] = 2,
    seed: Annotated[int, typer.Option(help="of the latents' distances from zero")] = 0,
) -> None:
    """Write a wider model that computes the same, to train on from with `fbiedge train --init`."""
    from . import terminal

    with extra("export"):
        from .widen import widen as run
    _require_new(output)
    if seed < 0:
        raise UsageError(f"seed is {seed}, expected a whole number of at least 0")
    wide = run(model, output, factor, seed)
    terminal.print_text(
        f"wrote {output}: hidden size {wide.hidden_size}, {wide.num_attention_heads} heads, {factor * factor} times the signs"
    )


app.command()(cli_export.export)
app.command()(cli_serve.serve)
app.command()(cli_web.web)
app.command("eval")(cli_evaluate.evaluate)
app.command()(cli_evaluate.verify)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def train(context: typer.Context) -> None:
    """Train a model: teacher, tokenizer, distillation. `fbiedge train --help` lists the steps."""
    with extra("train"):
        importlib.import_module("torch")
        training: Any = importlib.import_module("fbiedge.training.cli")
    raise typer.Exit(training.main(context.args))


app.command()(cli_analyze.analyze)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """`1,2` -> (1, 2)."""
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"--{option} is {text!r}, expected whole numbers with commas between, such as 1,2") from None


def run(arguments: list[str]) -> int:
    """Run the command line -> the exit code: 0, 2 for an error that was explained in one line, 130 for Ctrl-C.

    SIGTERM raises SystemExit with the code 143.
    """
    try:
        from . import terminal  # in here, because Ctrl-C may come as early as this

        terminal.prepare_streams()
        with terminal.terminable():
            code = app(arguments, prog_name="fbiedge", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except FbiEdgeError as error:
        terminal.print_error(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        _discard_stdout()  # the reader has gone, as in `| head`
        return 1
    except OSError as error:
        _discard_stdout()
        terminal.print_error(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return 2
    except MemoryError as error:
        terminal.print_error(
            f"there is not enough memory{f': {error}' if str(error) else ''}; use a smaller model or context"
        )
        return 2
    except RecursionError:
        terminal.print_error("something in the input is nested too deeply to be read")
        return 2
    except Exception as error:
        # Errors in usage. typer takes click's class or its own copy of it, depending on its version; both say what is
        # wrong by format_message().
        if not hasattr(error, "format_message"):
            raise
        terminal.print_error(f"{error.format_message()} (see fbiedge --help)")
        return 2


def _discard_stdout() -> None:
    """Python flushes stdout at exit; after a failed write that must not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point of the command `fbiedge`."""
    try:
        code = run(sys.argv[1:])
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    parallel = sys.modules.get("fbiedge.training.parallel")  # a training, maybe on many processes
    (sys.exit if parallel is None else parallel.leave)(code)


if __name__ == "__main__":
    main()
