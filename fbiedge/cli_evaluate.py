"""The commands `fbiedge eval` and `fbiedge verify`: what a model knows, and whether two are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_support import read_text
from .errors import UsageError

DEFAULT_WINDOW = 2048

Threads = Annotated[int | None, typer.Option(help="threads; by default and at most one for each core")]
Window = Annotated[int, typer.Option(help="tokens read at a time; at most the model's context")]
AsJson = Annotated[bool, typer.Option("--json", help="end with one line of JSON")]


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="model.onnx, model.gguf, or a checkpoint folder, also of another architecture")
    ],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to predict")] = None,
    dataset: Annotated[str | None, typer.Option(help="or a published one, from the hub: wikitext2, ptb, c4")] = None,
    dataset_file: Annotated[Path | None, typer.Option(help="the same as a file, where there is no hub")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="zero-shot tasks of lm-evaluation-harness, such as piqa,arc_easy")
    ] = None,
    task_file: Annotated[
        list[Path] | None,
        typer.Option(metavar="<path>", help="questions as JSON lines, also .gz or .xz; again for more"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="only so many questions of each task")] = None,
    window: Window = DEFAULT_WINDOW,
    max_tokens: Annotated[int | None, typer.Option(help="read only so many tokens of the text")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts a text, by the published windows, or how it does in zero-shot tasks."""
    from . import terminal

    _check(window, max_tokens)
    asked = [text is not None, dataset is not None, bool(tasks or task_file)]
    if sum(asked) != 1:
        raise UsageError("expected one of --text, --dataset, and --tasks or --task-file")
    for option, given, needs, has in (
        ("--dataset-file", dataset_file, "--dataset", asked[1]),
        ("--limit", limit, "--tasks or --task-file", asked[2]),
        ("--max-tokens", max_tokens, "--text or --dataset", not asked[2]),
    ):
        if given is not None and not has:
            raise UsageError(f"{option} has a meaning only with {needs}")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, expected at least 1")
    if not model.exists():
        _open(model, window, threads)  # says so now, not after minutes of reading tasks or texts
    report: Any
    if asked[2]:
        report = _run_tasks(model, _names(tasks), task_file or [], limit, window, threads)
    else:
        report = _perplexity(model, text, dataset, dataset_file, window, max_tokens, threads)
    for line in report.lines():
        terminal.print_text(line)
    if as_json:
        terminal.print_text(json.dumps(report.to_dict()))


def _perplexity(
    model: Path,
    text: Path | None,
    dataset: str | None,
    dataset_file: Path | None,
    window: int,
    max_tokens: int | None,
    threads: int | None,
) -> Any:
    from . import terminal
    from .evaluation import encode
    from .evaluation import evaluate as run

    most = None
    if dataset is not None:
        from .benchmark_texts import benchmark_text, read_benchmark_text

        most = benchmark_text(dataset).most_windows
        content = read_benchmark_text(dataset, dataset_file)
    else:
        assert text is not None
        content = read_text(text)
    engine = _open(model, window, threads)
    if engine.tokenizer is None:
        raise UsageError(f"{model} has no tokenizer; put a tokenizer.json beside the checkpoint, and export it again")
    ids = encode(engine.tokenizer, content, engine.vocab_size)[:max_tokens]
    if most is not None:
        ids = ids[: most * min(window, engine.capacity)]
    with terminal.progress_bar("evaluating") as update:
        return run(engine, ids, window=window, progress=update)


def _run_tasks(
    model: Path, names: list[str], paths: list[Path], limit: int | None, window: int, threads: int | None
) -> Any:
    from . import terminal
    from .harness.files import read_task_file
    from .harness.tasks import import_harness, load_tasks, run_tasks

    files = [read_task_file(path) for path in paths]
    import_harness(hub=bool(names))  # before the model is opened, which may take long
    tasks = load_tasks(names, files)
    engine = _open(model, window, threads)
    with terminal.progress_bar("evaluating") as update:
        return run_tasks(engine, tasks, window=window, limit=limit, progress=update)


def _names(tasks: str | None) -> list[str]:
    """`a,b` -> [a, b], each once."""
    names = [name.strip() for name in (tasks or "").split(",")] if tasks else []
    if not all(names):
        raise UsageError(f"--tasks is {tasks!r}, expected names with commas between, such as piqa,arc_easy")
    return list(dict.fromkeys(names))


def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="the reference: model.onnx, model.gguf or checkpoint folder")],
    b: Annotated[Path, typer.Argument(metavar="B", help="what should be the same")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to run; default: a built-in one of a few sentences")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="run at most so many tokens of the text")] = 10_000,
    max_kl: Annotated[float, typer.Option(help="largest mean KL divergence, in nats")] = 1e-3,
    min_agreement: Annotated[float, typer.Option(help="smallest share of equal most likely tokens, 0 to 1")] = 0.99,
    window: Window = DEFAULT_WINDOW,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run two models on a text and compare their logits. Exit code 1 where they differ by more than the bounds."""
    from . import terminal
    from .sample_text import SAMPLE_TEXT
    from .verify import Bounds, common_ids
    from .verify import verify as run

    _check(window, max_tokens)
    bounds = Bounds(max_kl=max_kl, min_agreement=min_agreement)
    content = SAMPLE_TEXT if text is None else read_text(text)
    engines = _open(a, window, threads), _open(b, window, threads)
    ids = common_ids(*engines, content)[:max_tokens]
    with terminal.progress_bar("comparing") as update:
        report = run(*engines, ids, bounds=bounds, window=window, progress=update)
    for line in report.lines():
        terminal.print_text(line)
    if as_json:
        terminal.print_text(json.dumps(report.to_dict()))
    if report.beyond:
        raise typer.Exit(1)


def _open(path: Path, window: int, threads: int | None) -> Any:
    """The engine for `path`, after a warning where something is not as it should be."""
    from . import terminal
    from .engines import open_logits

    engine = open_logits(path, tokens=window, threads=threads)
    if engine.warning:
        terminal.print_warning(engine.warning)
    return engine


def _check(window: int, max_tokens: int | None) -> None:
    if window < 2:
        raise UsageError(f"--window is {window}, expected at least 2 tokens")
    if max_tokens is not None and max_tokens < 2:
        raise UsageError(f"--max-tokens is {max_tokens}, expected at least 2")
