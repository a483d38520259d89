"""Text generation: one generator of dataclasses that chat, `fbiedge generate`, servers and benchmarks all drive.

To use it:

    for event in generate(session, tokenizer, tokenizer.encode("Once upon a time"), GenerationOptions(max_tokens=64)):
        match event:
            case Piece(text=text): ...       # as soon as it is certain
            case GenerationStats(): ...      # exactly one, the last event
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from .errors import ModelFileError, UsageError
from .model_file import ModelFile
from .sampling import Sampler, SamplingOptions
from .tokenizer import DetokenizeStream, Tokenizer

PREFILL_CHUNK = 128  # tokens between two looks at `cancelled`

# end: the model ended its text; stop: a stop string; length: max_tokens; context: the cache is full; cancelled: Ctrl-C
FinishReason = Literal["end", "stop", "length", "context", "cancelled"]


class Engine(Protocol):
    """What generation needs of a session."""

    @property
    def capacity(self) -> int: ...
    @property
    def position(self) -> int: ...
    def reuse(self, ids: Sequence[int]) -> int: ...
    def forward(self, ids: Sequence[int]) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """When to stop, and how to pick tokens. Raises UsageError."""

    max_tokens: int | None = None  # None: until the model ends its text or the context is full
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}, expected at least 1")
        if "" in self.stop:
            raise UsageError("a stop string is empty, expected at least one character")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that is certain now. `token_id` is None for what was held back until the end."""

    text: str
    token_id: int | None


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What one generation took. The first token is part of the prefill, as in time to first token."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the cache and not run again
    generated_ids: tuple[int, ...] = field(repr=False)
    prefill_seconds: float
    decode_seconds: float
    finish_reason: FinishReason
    ended_by: int | None = None  # the end-of-text token, which is not among generated_ids

    @property
    def generated_tokens(self) -> int:
        """Tokens generated, the end-of-text token left out."""
        return len(self.generated_ids)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens that were run, by the time until the first logits."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode steps by their time; the first token came with the prefill."""
        steps = self.generated_tokens - 1 + (self.ended_by is not None)
        return _rate(steps, self.decode_seconds)


def end_tokens(model: ModelFile, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text: those of generation_config.json, config.json and the tokenizer's eos_token.

    Raises ModelFileError where one of the files lists what is no id.
    """
    ends: set[int] = {model.config.eos_token_id}
    for key in ("generation_config", "config"):
        try:
            ends.update(listed_ids(model.json_object(key), "eos_token_id"))
        except UsageError as error:
            raise ModelFileError(f"{model.path} has an unusable fbiedge.{key}: {error}; export it again") from error
    named = tokenizer.token_id(tokenizer.eos_token) if tokenizer.eos_token else None
    return frozenset(ends if named is None else ends | {named})


def listed_ids(raw: dict[str, Any], key: str) -> list[int]:
    """`raw[key]`, which may be a token id, a list of them, null or absent. Raises UsageError."""
    value = raw.get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in listed):
        raise UsageError(f"{key} is {value!r}, expected a token id or a list of them")
    return listed


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    *,
    ends: frozenset[int],
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Piece | GenerationStats]:
    """Continue `prompt_ids` until one of the `ends`, a limit of `options`, or `cancelled()`.

    What the engine's cache shares with the prompt is not run again. Raises UsageError where the prompt doesn't fit.
    """
    if len(prompt_ids) > engine.capacity:
        raise UsageError(f"prompt of {len(prompt_ids)} tokens is longer than the context of {engine.capacity}")
    if not prompt_ids:
        raise UsageError("the prompt is empty, expected at least one token")
    started = time.perf_counter()
    sampler = Sampler(options.sampling)
    detokenizer = DetokenizeStream(tokenizer, prompt_ids)
    matcher = StopMatcher(options.stop)
    generated: list[int] = []
    ended_by: int | None = None

    cached = engine.reuse(prompt_ids)
    logits: npt.NDArray[np.float32] | None = None
    for start in range(cached, len(prompt_ids), PREFILL_CHUNK):
        if cancelled():
            break
        logits = engine.forward(prompt_ids[start : start + PREFILL_CHUNK])
    prefilled = time.perf_counter()

    finish_reason: FinishReason = "cancelled"
    while logits is not None and not cancelled() and engine.position >= len(prompt_ids):
        recent = [*prompt_ids[-64:], *generated][-64:]
        token_id = sampler.sample(logits, recent)
        if token_id in ends:
            finish_reason, ended_by = "end", token_id
            break
        generated.append(token_id)
        text = matcher.push(detokenizer.push(token_id))
        if text:
            yield Piece(text=text, token_id=token_id)
        if matcher.stopped:
            finish_reason = "stop"
            break
        if len(generated) == options.max_tokens:
            finish_reason = "length"
            break
        if engine.position == engine.capacity:
            finish_reason = "context"
            break
        logits = engine.forward([token_id])

    rest = "" if matcher.stopped else matcher.push(detokenizer.flush()) + matcher.flush()
    if rest:
        yield Piece(text=rest, token_id=None)
    yield GenerationStats(
        prompt_tokens=len(prompt_ids),
        cached_tokens=cached,
        generated_ids=tuple(generated),
        prefill_seconds=prefilled - started,
        decode_seconds=time.perf_counter() - prefilled,
        finish_reason=finish_reason,
        ended_by=ended_by,
    )


class StopMatcher:
    """Lets text through until one of the stop strings, and holds back what may still become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is now known not to belong to a stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
