"""Zero-shot questions in a file: JSON lines, of one form in a file, also packed as .gz or .xz.

    {"context": TEXT, "choices": [TEXT, …], "gold": N}                 our own: the context is read as it stands
    {"query": TEXT, "choices": [TEXT, …], "gold": N}                   LLM Foundry's multiple choice
    {"context_options": [TEXT, …], "continuation": TEXT, "gold": N}    LLM Foundry's schema, for Winograd's kind

`gold` counts from 0. A model answers by the choice that it finds most likely after the context and a space; in the third
form, by the context after which it finds the continuation most likely. Other fields are for people.

A query loses the space at its end, and where its last line begins with `Question:`, it is followed by a line `Answer:`.
So LLM Foundry's files of ARC, PIQA and BoolQ give the prompts that lm-evaluation-harness makes of the same questions, but
for the `Passage:` that BoolQ's begin with there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmark_texts import text_lines
from ..errors import UsageError, printable

_PACKED = (".gz", ".xz")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What varies among the options comes in `contexts` or in `continuations`; of the other there is one."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """The questions of one file."""

    path: Path
    name: str  # of the task: that of the file without its endings
    questions: list[Question]
    varies: str  # `contexts` or `continuations`


def read_task_file(path: Path) -> TaskFile:
    """The questions in `path`. Raises UsageError, which names the line that is wrong."""
    questions = []
    for number, line in enumerate(text_lines(path, "task file"), 1):
        if line.strip():
            questions.append(_question(line, f"{path}: line {number}"))
            if _varies(questions[-1]) != _varies(questions[0]):
                raise UsageError(f"{path}: line {number} is of another form than those before it")
    if not questions:
        raise UsageError(f"{path} holds no questions, expected one a line")
    plain = path.with_suffix("") if path.suffix in _PACKED else path
    return TaskFile(path=path, name=plain.stem, questions=questions, varies=_varies(questions[0]))


def _varies(question: Question) -> str:
    return "contexts" if len(question.contexts) > 1 else "continuations"


def _question(line: str, where: str) -> Question:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{where} holds a JSON {type(raw).__name__}, expected an object")
    if "context_options" in raw:
        options = contexts = _texts(raw, "context_options", where)
        continuations: tuple[str, ...] = (_text(raw, "continuation", where),)
    elif "context" in raw or "query" in raw:
        context = _text(raw, "context", where) if "context" in raw else _prompt(_text(raw, "query", where))
        contexts = (context,)
        options = continuations = _texts(raw, "choices", where)
    else:
        raise UsageError(f'{where} has none of "context", "query" and "context_options"')
    gold = raw.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
        raise UsageError(f'{where}: "gold" is {printable(repr(gold))}, expected a number from 0 to {len(options) - 1}')
    return Question(contexts=contexts, continuations=continuations, gold=gold)


def _prompt(query: str) -> str:
    query = query.rstrip()
    return f"{query}\nAnswer:" if query.rpartition("\n")[2].startswith("Question:") else query


def _text(raw: dict[str, Any], name: str, where: str) -> str:
    return _valid(raw.get(name), f'{where}: "{name}"')


def _texts(raw: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = raw.get(name)
    if not isinstance(values, list) or len(values) < 2:
        raise UsageError(f'{where}: "{name}" is no list of at least two texts')
    return tuple(_valid(value, f'{where}: option {number} of "{name}"') for number, value in enumerate(values))


def _valid(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{what} is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} has half a surrogate pair, which is no text") from None
    return value
