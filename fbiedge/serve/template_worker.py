"""Renders a chat template in a process of its own, which can be ended.

A template is a program from whoever made the model. Jinja's sandbox keeps it from files and from Python, but not from
looping for ever or from doubling a text until memory is full. So the system sets the bounds: memory (not on Windows and
macOS, which have no such limit) and CPU time here, time on the clock by whoever waits (templates.py).

Lines of JSON: first {"source", "special_tokens"}, then for each {"messages", "limit"} one {"text"} or {"error"}.
"""

from __future__ import annotations

import json
import sys

from ..chat_template import ChatTemplate
from ..errors import FbiEdgeError

MEMORY_BYTES = 1 << 30  # of addresses, of which Python takes a quarter
CPU_SECONDS = 10  # for one conversation: ends what goes on after the server was killed


def main() -> None:
    """Until the end of stdin."""
    first = json.loads(sys.stdin.readline())
    template = ChatTemplate(first["source"], first["special_tokens"])
    for line in sys.stdin:
        asked = json.loads(line)
        _limit()
        try:
            text = template.render(asked["messages"])
            answer = {"text": text}
            if len(text) > asked["limit"]:
                answer = {
                    "error": f"the model's chat template made a text of {len(text)} characters of the conversation"
                }
        except FbiEdgeError as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": "the model's chat template failed: MemoryError"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + CPU_SECONDS),
    ):
        _, hard = resource.getrlimit(limit)
        try:
            resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        except (OSError, ValueError):  # a system that doesn't know it
            continue
