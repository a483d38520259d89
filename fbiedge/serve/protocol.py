"""What may be asked: the JSON of a request to dataclasses with checked types, or a 400 that says what is wrong.

OpenAI's fields fall into four kinds, and README.md lists which is which:

    honoured      they are fields of the classes here, with top_k, min_p and others that llama.cpp and vLLM have added
    no effect     they are notes for OpenAI's own service, such as `user`: accepted
    not offered   accepted where they ask for what happens anyway, such as a frequency_penalty of 0; else refused
    unknown       refused, as OpenAI does: a misspelt `temprature` would be ignored in silence otherwise
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core

from ..chat_template import Message
from .api_error import ApiError, invalid

MAX_CHOICES = 128  # of one request, over all its prompts
MAX_STOP_STRINGS = 16
MAX_CONSTRAINT = 1 << 16  # characters; one of a megabyte takes llguidance most of a minute

_NO_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "prediction",
}  # fmt: skip
# Besides null, the values that ask for what happens anyway.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "modalities": (["text"],), "audio": (), "web_search_options": (), "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    # of llama.cpp and vLLM
    "typical_p": (1,), "tfs_z": (1,), "mirostat": (0,), "dynatemp_range": (0,), "xtc_probability": (0,),
    "dry_multiplier": (0,), "length_penalty": (1,), "use_beam_search": (False,), "ignore_eos": (False,),
    "min_tokens": (0,), "repeat_penalty": (1,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "chat_template": (), "chat_template_kwargs": ({},), "samplers": (), "n_keep": (0,), "n_predict": (),
}  # fmt: skip

Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None


class _Message(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None
    refusal: None = None  # as the client's own object of an earlier answer has it
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None
    tool_calls: list[Any] | None = pydantic.Field(None, max_length=0)


class _StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class _JsonSchema(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = pydantic.Field(alias="schema")
    strict: bool | None = None


class _ResponseFormat(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class Request(pydantic.BaseModel):
    """What both ways to ask have in common. None: what the model's makers recommend, or no limit."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: int = pydantic.Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = pydantic.Field(None, ge=1)
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    seed: int | None = pydantic.Field(None, ge=0, lt=1 << 64)
    stop: str | list[str] | None = None
    logit_bias: dict[str, Number] | None = None
    response_format: _ResponseFormat | None = None
    grammar: str | None = None
    regex: str | None = None
    cache_prompt: bool = True  # as in llama.cpp: False runs the whole prompt

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many likely tokens to name beside each token; None: no logprobs at all."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Checked."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOP_STRINGS:
            raise invalid(f"stop has {len(stop)} strings, expected at most {MAX_STOP_STRINGS}", "stop")
        if "" in stop:
            raise invalid("stop has an empty string, expected at least one character", "stop")
        return tuple(stop)

    @property
    def biases(self) -> dict[int, float]:
        """logit_bias by token id."""
        try:
            return {int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()}
        except ValueError:
            raise invalid("logit_bias has a key that is no token id", "logit_bias") from None

    @property
    def constraint(self) -> dict[str, Any] | None:
        """What the text must be, as keywords of compile_constraint; None: anything."""
        wanted: dict[str, Any] = {
            "json_schema": None,
            "json_object": False,
            "grammar": self.grammar,
            "regex": self.regex,
        }
        if self.response_format is not None:
            kind, schema = self.response_format.type, self.response_format.json_schema
            if (kind == "json_schema") != (schema is not None):
                raise invalid("response_format needs a json_schema where its type is json_schema", "response_format")
            wanted["json_object"] = kind == "json_object"
            wanted["json_schema"] = schema and schema.schema_
        asked = [name for name, value in wanted.items() if value not in (None, False)]
        if len(asked) > 1:
            raise invalid(f"the request has a {' and a '.join(asked)}, expected one of them")
        if len(json.dumps([wanted[name] for name in asked])) > MAX_CONSTRAINT:
            raise invalid(f"the {asked[0]} is longer than {MAX_CONSTRAINT:,} characters", asked[0])
        return wanted if asked else None


class CompletionRequest(Request):
    """Of /v1/completions."""

    prompt: Any = pydantic.Field(...)
    max_tokens: int | None = pydantic.Field(16, ge=1)  # as OpenAI
    logprobs: int | None = pydantic.Field(None, ge=0, le=20)

    @property
    def top_logprobs_wanted(self) -> int | None:
        """See Request."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or _is_ids(prompt):
            return [prompt]
        if isinstance(prompt, list) and prompt and all(isinstance(one, str) or _is_ids(one) for one in prompt):
            return prompt
        raise invalid("prompt is neither a text, a list of token ids, nor a list of such prompts", "prompt")


class ChatRequest(Request):
    """Of /v1/chat/completions."""

    messages: list[_Message] = pydantic.Field(min_length=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)

    @property
    def top_logprobs_wanted(self) -> int | None:
        """See Request."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def turns(self) -> list[Message]:
        """The messages as a chat template takes them."""
        turns: list[Message] = []
        for at, message in enumerate(self.messages):
            content = message.content
            if not isinstance(content, str):
                for part in content:
                    if part.type != "text" or part.text is None:
                        raise invalid(
                            f"messages.{at}.content has a part of type {part.type!r}, expected text: "
                            "this model reads nothing else",
                            "messages",
                        )
                content = "".join(part.text or "" for part in content)
            turns.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        return turns


Asked = TypeVar("Asked", bound=Request)


def parse(body: bytes, kind: type[Asked]) -> Asked:
    """The request in `body`. Raises ApiError."""
    try:
        raw = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not JSON that can be read: {error}") from error
    if not isinstance(raw, dict):
        raise invalid(f"the body is a JSON {_json_type(raw)}, expected an object")
    fields = {name: value for name, value in raw.items() if value is not None and name not in _NO_EFFECT}
    for name in fields.keys() - kind.model_fields.keys():
        _refuse(name, fields[name], kind)
    fields = {name: value for name, value in fields.items() if name in kind.model_fields}
    try:
        request = kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _explained(error) from error
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options has no meaning without stream", "stream_options")
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            if request.max_tokens not in (None, request.max_completion_tokens):
                raise invalid("max_tokens and max_completion_tokens say different things; send one", "max_tokens")
            request.max_tokens = request.max_completion_tokens
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    return request


def _refuse(name: str, value: Any, kind: type[Request]) -> None:
    """Raises ApiError for a field that is not offered with this value, or unknown."""
    if name in _NOT_OFFERED:
        neutral = _NOT_OFFERED[name]
        # True == 1 in Python, but not in JSON.
        if any(type(value) in (type(one), float) and value == one for one in neutral):
            return
        instead = f"; leave it out or send {' or '.join(map(json.dumps, neutral))}" if neutral else "; leave it out"
        raise invalid(f"{name} is not offered by this server{instead}", name, "unsupported_parameter")
    shown = _shortened(name)
    near = difflib.get_close_matches(shown, kind.model_fields, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise invalid(f"unknown field {shown!r}{hint}", shown, "unknown_parameter")


def _explained(error: pydantic.ValidationError) -> ApiError:
    """The first thing that is wrong, with its place."""
    found = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(_shortened(str(part)) for part in found["loc"])
    if found["type"] == "missing":
        return invalid(f"{place} is missing", place, "missing_required_parameter")
    if found["type"] == "extra_forbidden":
        return invalid(f"unknown field {place}", place, "unknown_parameter")
    got = found["input"]
    shown = _shortened(json.dumps(got)) if isinstance(got, (str, int, float)) else f"a JSON {_json_type(got)}"
    wants = found["msg"][0].lower() + found["msg"][1:]
    return invalid(f"{place} is {shown}: {wants}", place)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
