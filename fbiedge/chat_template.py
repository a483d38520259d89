"""A conversation as the text that the model was trained on, by the Jinja template that travels in the model.

A template is a program from whoever made the file, so it runs in Jinja's immutable sandbox: no attributes that lead to
Python's inside, no changes to what it is given, no file loader. The helpers are the ones Hugging Face offers, because
templates call them.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn, TypedDict

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import ModelFileError
from .model_file import ModelFile


class Message(TypedDict):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None) -> None:
        """`special_tokens`: bos_token, eos_token and so on by name. Raises ModelFileError."""
        self.source = source
        self.special_tokens = special_tokens or {}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            # Or constants such as 9 ** 9 ** 9 are computed here already, where nothing bounds it.
            optimized=False,
            finalize=_unchanged,
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelFileError(f"the chat template can't be read: line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise ModelFileError("the chat template can't be read: nested too deeply") from error

    @classmethod
    def from_model(cls, model: ModelFile) -> ChatTemplate | None:
        """The template inside `model`, None where it has none. Raises ModelFileError."""
        tokenizer_config = model.json_object("tokenizer_config")
        source = model.metadata.get("chat_template") or tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several by name, as some tokenizer_config.json have them
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if not isinstance(source, str) or not source.strip():
            return None
        special_tokens = {}
        for name, value in (model.json_object("special_tokens_map") | tokenizer_config).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                special_tokens[name] = text
        return cls(source, special_tokens)

    def render(self, messages: list[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of `messages`, ending where the model's answer begins. Raises ModelFileError."""
        variables: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # a template may fail in any way a program can
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelFileError(f"the model's chat template failed: {reason}") from error


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the answers for training; here only its contents matter."""

    tags = {"generation"}  # noqa: RUF012 -- declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _unchanged(_context: Any, value: Any) -> Any:
    """What depends on a context is no constant."""
    return value


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """As JSON without Jinja's escapes for HTML, which a model never saw."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
