"""`fbiedge chat` and `generate` at a real terminal: header, streaming, Ctrl-C, Ctrl-D, commands."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_model import CHAT_TEMPLATE, tiny_model

pty = pytest.importorskip("pty", reason="needs a Unix terminal")

PROMPT = "> "


class Terminal:
    """A command whose stdin, stdout and stderr are one pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fbiedge.cli", *map(str, arguments)],
            stdin=child, stdout=child, stderr=child, start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def expect(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Read until `pattern` shows up in what was not yet expected."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            try:
                data = os.read(self.fd, 65536) if ready else b""
            except OSError:  # how Linux says that the other side is closed
                data = b""
            assert data, f"no {pattern!r} in {self.seen!r}"
            self.seen += data.decode(errors="replace").replace("\r\n", "\n")
        self.seen = self.seen[found.end() :]
        return found

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        # What is on the screen comes a moment before input() listens, and Python loses a signal in between.
        time.sleep(0.3)
        os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends a text and has room for 4096 tokens, so that there is time to press a key."""
    from support.checkpoints import small_config, small_tensors

    from fbiedge.exporters.onnx import export_onnx
    from fbiedge.weights import open_checkpoint, write_checkpoint

    folder = tmp_path_factory.mktemp("endless")
    tiny_model(folder, chat_template=CHAT_TEMPLATE, max_position_embeddings=4096)
    weights = open_checkpoint(folder / "checkpoint")
    config = small_config(vocab_size=259, head_dim=16, max_position_embeddings=4096)
    tensors = small_tensors(config)
    tensors["lm_head.weight"][:3] = 0  # the special tokens
    tensors["lm_head.weight"][3 + 33 :] = 0  # all but printable ASCII, to be sure of a line of plain text
    tensors["lm_head.weight"][3 : 3 + 33] *= 3
    write_checkpoint(folder / "checkpoint", config, tensors.items(), dict(weights.files))
    path = folder / "model.onnx"
    export_onnx(open_checkpoint(folder / "checkpoint"), path, accuracy_level="fp32", head="fp32")
    return path


@pytest.fixture
def terminal(endless_model: Path) -> Iterator[Terminal]:
    opened = Terminal("chat", endless_model, "--temperature", "1", "--seed", "1", "--min-p", "0.1")
    yield opened
    opened.close()


def test_a_chat_from_header_to_exit(endless_model: Path) -> None:
    terminal = Terminal("chat", endless_model, "--max-tokens", "5", "--threads", "1")
    try:
        terminal.expect("fbiedge \\d")
        terminal.expect("model +model.onnx, 2 layers")
        terminal.expect("engine +(\\S+ kernels|stock ops fallback), fp32 activations, 1 thread, context 4096")
        terminal.expect("/exit or Ctrl-D: leave")
        terminal.expect(PROMPT)
        terminal.send("Hello\n")
        terminal.expect(
            r"prefill 24 tokens, \d+ tok/s · decode 5 tokens, [\d.]+ tok/s · context 28/4096 · ended by --max-tokens"
        )
        terminal.expect(PROMPT)
        terminal.send("again\n")
        terminal.expect(r"prefill 25 tokens \(28 cached\)")
        terminal.expect(PROMPT)
        terminal.send("/reset\n")
        terminal.expect("new conversation")
        terminal.expect(PROMPT)
        terminal.send("Hello\n")
        terminal.expect("prefill \\d+ tokens")
        terminal.expect(PROMPT)
        terminal.send("/nonsense\n")
        terminal.expect("there is no command /nonsense")
        terminal.expect(PROMPT)
        terminal.send("/help\n")
        terminal.expect("/reset: new")
        terminal.expect(PROMPT)
        terminal.send("/exit\n")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.expect(PROMPT)
    for _ in range(2):
        terminal.send("Hello\n")
        terminal.expect("Hello\n.{20}")  # the answer is on its way
        terminal.interrupt()
        terminal.expect("ended by Ctrl-C")
        terminal.expect(PROMPT)
    assert terminal.process.poll() is None
    terminal.interrupt()  # at an empty prompt, perhaps a moment too late for the answer
    terminal.expect("/exit or Ctrl-D leaves")
    terminal.expect(PROMPT)
    assert terminal.process.poll() is None
    terminal.send("/exit\n")
    assert terminal.process.wait(20) == 0
    assert "Traceback" not in terminal.seen


def test_ctrl_c_after_some_text_drops_the_text(terminal: Terminal) -> None:
    terminal.expect(PROMPT)
    terminal.send("not this")
    terminal.expect("not this")
    terminal.interrupt()
    terminal.expect(PROMPT)
    terminal.send("/help\n")
    terminal.expect("/reset: new")  # and so not "not this/help"
    terminal.expect(PROMPT)
    terminal.send("\x04")
    assert terminal.process.wait(20) == 0


def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.expect(PROMPT)
    terminal.send("\x04")
    assert terminal.process.wait(20) == 0


def test_a_full_context_is_said_and_survived(endless_model: Path) -> None:
    terminal = Terminal("chat", endless_model, "--context", "60", "--no-context-shift")
    try:
        terminal.expect(PROMPT)
        terminal.send("Hello\n")
        terminal.expect("ended by the end of the context")
        terminal.expect("the context of 60 tokens is full; /reset starts a new conversation")
        terminal.expect(PROMPT)
        terminal.send("again\n")
        terminal.expect("no longer fits the context of 60; /reset starts a new one")
        terminal.expect(PROMPT)
        terminal.send("/reset\n")
        terminal.expect(PROMPT)
        terminal.send("again\n")
        terminal.expect("prefill 17 tokens \\(7 cached\\)")  # all templates begin alike
    finally:
        terminal.close()


def test_the_oldest_turns_make_room(endless_model: Path) -> None:
    terminal = Terminal("chat", endless_model, "--context", "80", "--max-tokens", "20")
    try:
        for _ in range(2):
            terminal.expect(PROMPT)
            terminal.send("Hello\n")
            terminal.expect("ended by --max-tokens")
        terminal.expect("the context is full: the oldest turn was forgotten")
        terminal.expect(PROMPT)
    finally:
        terminal.close()


def test_a_model_without_a_template_says_so(plain_model: Path) -> None:
    terminal = Terminal("chat", plain_model)
    try:
        terminal.expect("no chat template in this model: it plainly continues what you write")
    finally:
        terminal.close()


def test_ctrl_c_ends_generate_with_its_stats(endless_model: Path) -> None:
    terminal = Terminal("generate", endless_model, "-p", "Hello", "--max-tokens", "4000", "--temperature", "1")
    try:
        terminal.expect(".{20}")
        terminal.interrupt()
        terminal.expect("ended by Ctrl-C")
        assert terminal.process.wait(20) == 130
    finally:
        terminal.close()


def test_no_prompt_at_a_terminal(plain_model: Path) -> None:
    terminal = Terminal("generate", plain_model)
    try:
        terminal.expect("error: there is no prompt; give one with -p TEXT or pipe one in\n")
        assert terminal.process.wait(20) == 2
    finally:
        terminal.close()


def test_control_characters_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fbiedge.generate import GenerationStats, Piece
    from fbiedge.terminal import stream_answer

    stats = GenerationStats(
        prompt_tokens=1, cached_tokens=0, generated_ids=(1,), prefill_seconds=1, decode_seconds=1, finish_reason="end"
    )  # fmt: skip
    events = [Piece(text="\x1b]0;title\x07a\tb\n\x9b2J漢", token_id=1), stats]
    assert stream_answer(events) == stats
    assert capsys.readouterr().out == "\x1b]0;title\x07a\tb\n\x9b2J漢\n"  # a pipe gets what the model said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    stream_answer(events)
    assert capsys.readouterr().out == "]0;titlea\tb\n2J漢\n"
