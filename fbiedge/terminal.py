"""Everything the user sees: the only module that knows rich, signals and whether a stream is a terminal.

Answers go to stdout and everything about them to stderr, so that a pipe holds only text.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import __version__
from .errors import FbiEdgeError, UsageError
from .generate import GenerationStats, Piece

if TYPE_CHECKING:
    from .bench import BenchReport
    from .cached_session import CachedSession
    from .chat import Chat
    from .inspection import Inspection

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

# A model must not move the cursor or retitle the window: control characters other than tab and newline are dropped.
_CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"}

_HELP = "/reset: new conversation · /exit or Ctrl-D: leave · Ctrl-C: stop an answer"


def prepare_streams() -> None:
    """UTF-8 in and out whatever the locale says; characters that can't be are replaced, never a traceback.

    What is written to a closed stdout or stderr goes nowhere; a closed stdin stays None.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 -- until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def print_error(message: str) -> None:
    """One line on stderr, never wrapped."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def print_warning(message: str) -> None:
    """One line on stderr, never wrapped."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr, flush=True)


def print_text(text: str) -> None:
    """A line on stdout as it is."""
    print(text, flush=True)


def read_prompt() -> str:
    """The prompt that is piped in, without its last line break. Raises UsageError where there is none."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("there is no prompt; give one with -p TEXT or pipe one in")
    return sys.stdin.read().removesuffix("\n")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the program as an exception does, so that half-written outputs are removed; the exit code is 143."""

    def on_terminate(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough, and cleaning up must not be cut short
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    previous = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a question: has Ctrl-C been pressed? A second press raises KeyboardInterrupt, should the first be too slow."""
    pressed = False

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def stream_answer(events: Iterable[Piece | GenerationStats]) -> GenerationStats:
    """Write the text of `events` to stdout as it comes, and a line break after it -> the last event."""
    on_terminal = sys.stdout.isatty()
    ends_line, stats = False, None
    for event in events:
        if isinstance(event, Piece):
            sys.stdout.write(event.text.translate(_CONTROLS) if on_terminal else event.text)
            sys.stdout.flush()
            ends_line = event.text.endswith("\n")
        else:
            stats = event
    assert stats is not None, "generate() ends with its stats"
    if not ends_line:
        sys.stdout.write("\n")
    sys.stdout.flush()
    return stats


def describe_engine(session: CachedSession) -> str:
    """What computes, in a few words."""
    threads = f"{session.threads} thread{'s' if session.threads > 1 else ''}"
    return f"{session.description}, {threads}, context {session.capacity}"


def print_stats(stats: GenerationStats, session: CachedSession, *, engine: bool) -> None:
    """One dim line on stderr: speed of prefill and decode, and why the text ended."""
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    fields = [
        f"prefill {stats.prompt_tokens - stats.cached_tokens} tokens{cached}, {stats.prefill_tokens_per_second:.0f} tok/s",
        f"decode {stats.generated_tokens} tokens, {stats.decode_tokens_per_second:.1f} tok/s",
        f"context {session.position}/{session.capacity}",
        f"ended by {_REASONS[stats.finish_reason]}",
    ]
    if engine:
        fields.append(describe_engine(session))
    err.print(Text(" · ".join(fields), style="dim"), soft_wrap=True)


_ARCHITECTURES = {"llama": "Llama", "qwen3": "Qwen3"}
_REASONS = {
    "end": "the model",
    "stop": "a stop string",
    "length": "--max-tokens",
    "context": "the end of the context",
    "cancelled": "Ctrl-C",
}


def run_chat(chat: Chat) -> None:
    """Chat until the input ends: with a terminal, a prompt and status lines; in a pipe, a turn a line and nothing else.

    In a pipe, raises FbiEdgeError where a turn can't be answered; at a terminal it says so and goes on.
    """
    if sys.stdin is None:
        raise UsageError("there is no input, stdin is closed; run chat at a terminal or pipe turns in")
    if not sys.stdin.isatty():
        for line in sys.stdin:
            command = line.strip()
            if command == "/exit":
                return
            if command == "/reset":
                chat.reset()
            elif command and command != "/help":
                stream_answer(chat.ask(line.rstrip("\r\n")))
        return
    _print_header(chat)
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/help":
                err.print(Text(_HELP, style="dim"))
            case "/reset":
                chat.reset()
                err.print(Text("new conversation", style="dim"))
            case command if command.startswith("/") and " " not in command:
                err.print(Text(f"there is no command {command}. {_HELP}", style="yellow"))
            case _:
                _answer(chat, line)


def _answer(chat: Chat, line: str) -> None:
    try:
        with interruptible() as cancelled:
            stats = stream_answer(chat.ask(line, cancelled))
    except KeyboardInterrupt:
        err.print(Text("\nanswer dropped", style="dim"))
        return
    except FbiEdgeError as error:
        err.print(Text(str(error), style="yellow"), soft_wrap=True)
        return
    print_stats(stats, chat.session, engine=False)
    if stats.finish_reason == "context":
        full = f"the context of {chat.session.capacity} tokens is full; /reset starts a new conversation"
        err.print(Text(full, style="yellow"), soft_wrap=True)


def _read_line() -> str | None:
    """A line from the terminal; None at Ctrl-D. Ctrl-C drops what was typed and doesn't leave: it may have been meant
    for an answer that has just ended."""
    with contextlib.suppress(ImportError):  # absent on Windows
        importlib.import_module("readline")  # gives input() line editing and history
    while True:
        try:
            return input("\n> ")
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves", file=sys.stderr)


def _print_header(chat: Chat) -> None:
    session = chat.session
    config = session.config
    shape = f"{config.num_hidden_layers} layers × {config.hidden_size}, vocabulary {config.vocab_size}"
    lines = [
        ("model    ", f"{session.model.path.name}, {shape}"),
        ("engine   ", describe_engine(session)),
    ]
    if chat.template is None:
        lines.append(("note     ", "no chat template in this model: it plainly continues what you write"))
    body = Text()
    for label, value in lines:
        body.append(label, style="dim").append(f"{value}\n")
    body.append(_HELP, style="dim")
    err.print(Panel(body, title=f"fbiedge {__version__}", title_align="left", expand=False, border_style="dim"))


def print_inspection(inspection: Inspection) -> None:
    """Architecture, groups of tensors, files and properties, as tables on stdout."""
    config = inspection.config
    about = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "file": str(inspection.path),
        "kind": inspection.kind,
        "architecture": f"{_ARCHITECTURES[config.model_type]}, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"FFN {config.intermediate_size}, {config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.num_key_value_heads} KV heads",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "parameters": f"{inspection.parameters:,}",
        **inspection.properties,
        **{f"file {name}": f"{size:,} bytes" for name, size in inspection.files.items()},
    }
    for label, value in rows.items():
        about.add_row(Text(label, style="dim"), Text(value))
    _print_table(about)
    _print_table(_group_table([{**entry} for entry in inspection.to_dict()["groups"]]))


def _group_table(groups: Iterable[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("group", "form", "tensors", "parameters", "bytes", "bits/weight"):
        table.add_column(heading, justify="left" if heading in ("group", "form") else "right")
    for entry in groups:
        table.add_row(
            Text(str(entry["group"])),
            Text(str(entry["form"])),
            f"{entry['tensors']:,}",
            f"{entry['parameters']:,}",
            f"{entry['bytes']:,}",
            f"{entry['bits_per_weight']:.3f}",
        )
    return table


def _print_table(table: Table) -> None:
    # In a pipe rich assumes 80 columns and would cut long paths; there every row is one line of any length.
    width = None if out.is_terminal else 1000
    for line in Text.from_ansi(_capture(table, width)).split("\n") if width else []:
        print(line.plain.rstrip())
    if width is None:
        out.print(table)
    sys.stdout.flush()


def _capture(table: Table, width: int) -> str:
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def print_export(report: Any) -> None:
    """What `export_onnx` wrote, and what it had measured before."""
    loss = report.loss
    files = {report.model: report.model_bytes} | ({report.data: report.data_bytes} if report.data else {})
    for path, size in files.items():
        print_text(f"wrote {path} ({size:,} bytes)")
    _print_table(_group_table(report.inventory))
    if report.zeros:
        print_text(f"{report.zeros:,} latent weights were exactly 0 and became +1")
    print_text(
        f"checked against the numpy reference on {loss.note}: max logit error {loss.max_logit_error:.3g}, "
        f"KL divergence {loss.kl_divergence:.3g} nats, top-1 agreement {100 * loss.top1_agreement:.1f} %"
    )


def print_gguf_export(report: Any) -> None:
    """What `export_gguf` wrote, and what its form can't hold."""
    print_text(f"wrote {report.model} ({report.model_bytes:,} bytes)")
    if report.adapter is not None:
        print_text(f"wrote {report.adapter} ({report.adapter_bytes:,} bytes): the offsets beta, as a LoRA (llama.cpp --lora)")
    _print_table(_group_table(report.inventory))
    if report.zeros:
        print_text(f"{report.zeros:,} latent weights were exactly 0 and became +1")
    if report.clamped:
        print_text(f"{report.clamped:,} scales of 0 became a millionth of their tensor's largest")
    if report.errors:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("fitted linear")
        table.add_column("rms error of its outputs", justify="right")
        for name, error in report.errors.items():
            table.add_row(Text(name), f"{100 * error:.2f} %")
        _print_table(table)
        print_text(f"lossy: {len(report.errors)} linears were fitted to {report.fit_tokens:,} tokens")
    elif report.costs is not None:
        print_text("exact, but for rounding scales to fp16")
    if (costs := report.costs) is not None:
        print_text(f"perplexity of the source on {costs.tokens:,} tokens: {costs.perplexity:.4g}")
        for form, cost in (("with its adapter", costs.with_adapter), ("without it", costs.without_adapter)):
            if cost is not None:
                print_text(
                    f"{form if report.adapter else 'the GGUF'}: perplexity {cost.perplexity:.4g}, KL divergence "
                    f"{cost.kl_divergence:.3g} nats, top-1 agreement {100 * cost.top1_agreement:.1f} %, "
                    f"max logit error {cost.max_logit_error:.3g}"
                )
    for note in report.notes:
        print_text(f"note: in llama.cpp, {note}")


def print_bench(report: BenchReport) -> None:
    """What `fbiedge bench` measured, as a table on stdout, and on what."""
    machine = report.machine
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in (
        "",
        "threads",
        "tok/s",
        "spread",
        "weights GB/s",
        "of reading",
        "peak RSS MB",
        "load s",
        "first single token s",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for row in report.measurements:
        speed = row.tokens_per_second
        table.add_row(
            f"prefill {row.tokens}" if row.kind == "prefill" else f"decode {row.tokens} at depth {row.depth}",
            str(row.threads) if row.threads_used == row.threads else f"{row.threads} ({row.threads_used})",
            _significant(speed.median),
            f"{_significant(speed.minimum)}–{_significant(speed.maximum)}",
            "–" if row.weights_gb_per_second is None else f"{row.weights_gb_per_second:.1f}",
            "–" if row.share_of_bandwidth is None else f"{100 * row.share_of_bandwidth:.0f} %",
            "–" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 1e6:.0f}",
            f"{row.load_seconds:.3f}",
            f"{row.first_token_seconds:.3f}",
        )
    busy = "" if machine.load_average is None else f", load average {machine.load_average}"
    lines = [
        f"model    {report.model}, {report.engine}",
        f"machine  {machine.cpu}, {machine.cores} cores{busy}",
        f"with     {', '.join(f'{name} {version}' for name, version in machine.versions.items())}",
        f"at       {machine.date}{f', commit {machine.commit}' if machine.commit else ''}",
    ]
    if report.fallback_reason:
        lines.append(f"note     {report.fallback_reason}")
    if report.weight_bytes_per_token is not None:
        lines.append(
            f"weights  {report.weight_bytes_per_token / 1e6:.1f} MB read by a decoded token; its KV cache comes on top"
        )
    for entry in report.bandwidth:
        mapped = entry.mapped_file
        file = (
            f", the mapped model file {mapped.median:.1f} ({mapped.minimum:.1f}–{mapped.maximum:.1f})" if mapped else ""
        )
        memory = f"{entry.memory.median:.1f} GB/s ({entry.memory.minimum:.1f}–{entry.memory.maximum:.1f})"
        lines.append(f"reading  {entry.threads} thread{'s' if entry.threads > 1 else ''}: memory {memory}{file}")
    for line in lines:
        print_text(line)
    _print_table(table)


def _significant(speed: float) -> str:
    """tok/s with three digits, or all before the point."""
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}" if speed >= 10 else f"{speed:.2f}"


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `update(done, total)`; draws only at a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
