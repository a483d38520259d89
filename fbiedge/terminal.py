"""Everything the user sees but tables (tables.py): streams, signals, and whether there is a terminal.

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
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from . import __version__
from .errors import FbiEdgeError, UsageError, printable
from .generate import Event, GenerationStats, Piece

if TYPE_CHECKING:
    from .cached_session import CachedSession
    from .chat import Chat

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

# A model must not move the cursor or retitle the window: control characters other than tab and newline are dropped.
_CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"}

_LONGEST_LINE = 800

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
    print(f"error: {_one_line(message)}", file=sys.stderr, flush=True)


def print_warning(message: str) -> None:
    """One line on stderr, never wrapped."""
    print(f"warning: {_one_line(message)}", file=sys.stderr, flush=True)


def _one_line(message: str) -> str:
    """Without what could end the line or talk to the terminal, and of a length that can be read: it may quote a file."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 200]} … {line[-200:]}"


def print_text(text: str) -> None:
    """A line on stdout as it is."""
    print(text, flush=True)


def read_prompt(most: int) -> str:
    """The prompt that is piped in, without its last line break. Raises UsageError where there is none or it is longer."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("there is no prompt; give one with -p TEXT or pipe one in")
    text = sys.stdin.read(most + 1)
    if len(text) > most:
        raise UsageError(f"the prompt is too long, expected at most {most:,} characters")
    return text.removesuffix("\n")


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


def stream_answer(events: Iterable[Event]) -> GenerationStats:
    """Write the text of `events` to stdout as it comes, and a line break after it -> the last event."""
    on_terminal = sys.stdout.isatty()
    ends_line, stats = False, None
    for event in events:
        if isinstance(event, GenerationStats):
            stats = event
        elif isinstance(event, Piece) and event.text:
            sys.stdout.write(event.text.translate(_CONTROLS) if on_terminal else event.text)
            sys.stdout.flush()
            ends_line = event.text.endswith("\n")
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
    lookup = f" ({stats.accepted_tokens} of {stats.drafted_tokens} guesses right)" if stats.drafted_tokens else ""
    shifted = f" ({stats.shifted_tokens} tokens forgotten)" if stats.shifted_tokens else ""
    fields = [
        f"prefill {stats.prompt_tokens - stats.cached_tokens} tokens{cached}, {stats.prefill_tokens_per_second:.0f} tok/s",
        f"decode {stats.generated_tokens} tokens, {stats.decode_tokens_per_second:.1f} tok/s{lookup}",
        f"context {session.position}/{session.capacity}{shifted}",
        f"ended by {_REASONS[stats.finish_reason]}",
    ]
    if engine:
        fields.append(describe_engine(session))
    err.print(Text(" · ".join(fields), style="dim"), soft_wrap=True)


_REASONS = {
    "end": "the model",
    "stop": "a stop string",
    "length": "--max-tokens",
    "context": "the end of the context",
    "cancelled": "Ctrl-C",
}


def run_chat(chat: Chat, *, first: str | None = None) -> None:
    """Chat until the input ends: with a terminal, a prompt and status lines; in a pipe, a turn a line and nothing else.

    first: a turn before those of the input.
    In a pipe, raises FbiEdgeError where a turn can't be answered; at a terminal it says so and goes on.
    """
    if sys.stdin is None:
        raise UsageError("there is no input, stdin is closed; run chat at a terminal or pipe turns in")
    if not sys.stdin.isatty():
        if first is not None:
            stream_answer(chat.ask(first))
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
    if first is not None:
        print(f"\n> {first.translate(_CONTROLS)}", file=sys.stderr)
        _answer(chat, first)
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
    if chat.forgotten_turns:
        turns = "the oldest turn was" if chat.forgotten_turns == 1 else f"the {chat.forgotten_turns} oldest turns were"
        err.print(Text(f"the context is full: {turns} forgotten", style="dim"), soft_wrap=True)
    if stats.finish_reason == "context" and not chat.options.context_shift:
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


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `update(done, total)`; draws only at a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # 1 MB, of which chat needs nothing

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
