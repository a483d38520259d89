"""The model's chat template, rendered in a process that is ended where it takes too long (template_worker.py says why)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import Any

from ..chat_template import ChatTemplate, Message
from .api_error import invalid

SECONDS = 5.0  # a template takes a millisecond
# No file of the current folder may pass for a module. (Python 3.11 has -P for this.)
_WORKER = (
    "import sys; sys.path = [path for path in sys.path if path]; from fbiedge.serve.template_worker import main; main()"
)


class BoundedTemplate:
    """A chat template with bounds of time and memory. Threads take turns."""

    def __init__(self, template: ChatTemplate, *, longest: int, seconds: float = SECONDS) -> None:
        """`longest`: characters that a conversation may become."""
        self._template = template
        self._longest = longest
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def render(self, messages: list[Message]) -> str:
        """The text of `messages`, ending where the answer begins. Raises ApiError."""
        with self._lock:
            worker = self._started()
            late = threading.Event()

            def end() -> None:
                late.set()
                worker.kill()

            timer = threading.Timer(self._seconds, end)
            timer.start()
            try:
                line = _ask(worker, {"messages": messages, "limit": self._longest})
            finally:
                timer.cancel()
            if not line:
                self._stop()
        if not line:
            reason = f"took longer than {self._seconds:g} s" if late.is_set() else "needs too much memory or time"
            raise invalid(f"the model's chat template {reason} for these messages", "messages")
        answer = json.loads(line)
        if "error" in answer:
            raise invalid(answer["error"], "messages")
        text: str = answer["text"]
        return text

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[str]:
        if self._worker is None or self._worker.poll() is not None:
            self._worker = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="ascii",
                # One thread of numpy's: the memory that others would reserve counts, too.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the server, which ends this
            )  # fmt: skip
            _send(self._worker, {"source": self._template.source, "special_tokens": self._template.special_tokens})
        return self._worker

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            with worker:  # closes its pipes and waits
                pass


def _ask(worker: subprocess.Popen[str], question: dict[str, Any]) -> str:
    """One line to the worker -> its answer, empty where it has ended."""
    assert worker.stdout is not None
    _send(worker, question)
    with contextlib.suppress(OSError, ValueError):
        line = worker.stdout.readline()
        return line if line.endswith("\n") else ""
    return ""


def _send(worker: subprocess.Popen[str], question: dict[str, Any]) -> None:
    assert worker.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # it has ended: reading its answer says so
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
