"""Text generation: one generator of dataclasses that chat, `fbiedge generate`, servers and benchmarks all drive.

To use it:

    for event in generate(session, tokenizer, tokenizer.encode("Once upon a time"), GenerationOptions(max_tokens=64)):
        match event:
            case PromptProgress(): ...       # after every run of a part of the prompt
            case Piece(text=text): ...       # one for every token, its text "" where that isn't certain yet
            case GenerationStats(): ...      # exactly one, the last event

One next() runs the engine at most once, on at most PREFILL_CHUNK tokens: whoever drives several generations is fair to
them by calling next() on each in turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from .errors import ModelFileError, UsageError
from .lookup import Decoder
from .model_file import ModelFile
from .sampling import PENALTY_WINDOW, Sampler, SamplingOptions, log_probabilities
from .stop_strings import StopMatcher
from .tokenizer import DetokenizeStream, Tokenizer

if TYPE_CHECKING:  # its library is loaded by whoever asks for a constraint
    from .constraint import Constraint

PREFILL_CHUNK = 128  # tokens between two looks at `cancelled`, and the most that one run takes

# end: the model ended its text, or its constraint did; stop: a stop string; length: max_tokens; context: the cache is
# full; cancelled: Ctrl-C
FinishReason = Literal["end", "stop", "length", "context", "cancelled"]


class Engine(Protocol):
    """What generation needs of a session."""

    @property
    def capacity(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def reuse(self, ids: Sequence[int]) -> int: ...
    def truncate(self, length: int) -> None: ...
    def forward(self, ids: Sequence[int], *, copy: bool = True) -> npt.NDArray[np.float32]: ...
    def all_logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """When to stop, how to pick tokens, and what to say about them. Raises UsageError."""

    max_tokens: int | None = None  # None: until the model ends its text or the context is full
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id, added before everything else
    constraint: Constraint | None = None  # what the text must be
    logprobs: int | None = None  # None: none; k: that of the token and of the k most likely ones
    lookup_tokens: int = 0  # guess at most so many tokens from what was said before, see lookup.py
    context_shift: bool = False  # forget the oldest tokens where the context is full
    keep_tokens: int = 1  # of the prompt's first ones, which a shift leaves: models lean on the very first

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}, expected at least 1")
        if "" in self.stop:
            raise UsageError("a stop string is empty, expected at least one character")
        for name, value, high in (
            ("logprobs", 0 if self.logprobs is None else self.logprobs, 20),  # as OpenAI
            ("lookup_tokens", self.lookup_tokens, PREFILL_CHUNK - 1),
            ("keep_tokens", self.keep_tokens, math.inf),
        ):
            if not _is_whole(value) or not 0 <= value <= high:
                wants = f"from 0 to {high}" if high < math.inf else "of at least 0"
                raise UsageError(f"{name} is {value!r}, expected a whole number {wants}")
        for token_id, bias in self.logit_bias.items():
            if not _is_whole(token_id) or token_id < 0:
                raise UsageError(f"logit_bias names token {token_id!r}, expected a token id")
            number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
            if not number or not -100 <= bias <= 100:  # also false for NaN; as OpenAI
                raise UsageError(f"logit_bias of token {token_id} is {bias!r}, expected a number from -100 to 100")


@dataclass(frozen=True, kw_only=True)
class PromptProgress:
    """Tokens that are in the cache, of those that must be before the next token can be picked."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A token and the text that is certain now. `token_id` is None for what was held back until the end."""

    text: str
    token_id: int | None
    # Natural logarithms of the model's own probabilities: before bias, penalty, constraint and temperature.
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the most likely tokens, most likely first


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
    drafted_tokens: int = 0  # guessed by lookup
    accepted_tokens: int = 0  # of those, what the model said too
    shifted_tokens: int = 0  # forgotten where the context was full

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
        """Tokens after the first, which came with the prefill, by their time."""
        steps = self.generated_tokens - 1 + (self.ended_by is not None)
        return _rate(steps, self.decode_seconds)


Event = PromptProgress | Piece | GenerationStats


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
    if not all(_is_whole(token_id) and token_id >= 0 for token_id in listed):
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
) -> Iterator[Event]:
    """Continue `prompt_ids` until one of the `ends`, a limit of `options`, or `cancelled()`.

    What the engine's cache shares with the prompt is not run again. Raises UsageError where the prompt doesn't fit,
    where a biased token is none of the model's, and where a constraint turns out to need too much.
    """
    if len(prompt_ids) > engine.capacity:
        raise UsageError(f"prompt of {len(prompt_ids)} tokens is longer than the context of {engine.capacity}")
    if not prompt_ids:
        raise UsageError("the prompt is empty, expected at least one token")
    if options.logit_bias and max(options.logit_bias) >= engine.vocab_size:
        raise UsageError(
            f"logit_bias names token {max(options.logit_bias)}, expected an id from 0 to {engine.vocab_size - 1}"
        )
    started = time.perf_counter()
    constraint = options.constraint.start(ends) if options.constraint else None
    sampler = Sampler(options.sampling, logit_bias=options.logit_bias, constraint=constraint)
    detokenizer = DetokenizeStream(tokenizer, prompt_ids)
    matcher = StopMatcher(options.stop)
    decoder = Decoder(engine, prompt_ids, options.lookup_tokens)
    # With shifts, a model that never ends its text must end somewhere: where its answer alone fills the context.
    most = options.max_tokens or (engine.capacity if options.context_shift else math.inf)
    generated: list[int] = []
    shifted = 0
    ended_by: int | None = None

    cached = engine.reuse(prompt_ids)
    logits = yield from _run(engine, prompt_ids[cached:], cancelled)
    prefilled = decoding = time.perf_counter()

    finish_reason: FinishReason = "cancelled"
    while logits is not None and not cancelled():
        token_id = sampler.sample(logits, decoder.tokens[-PENALTY_WINDOW:])
        if token_id in ends:
            finish_reason, ended_by = "end", token_id
            break
        generated.append(token_id)
        text = matcher.push(detokenizer.push(token_id))
        if options.logprobs is None:
            yield Piece(text=text, token_id=token_id)
        else:
            chosen, top = log_probabilities(logits, token_id, options.logprobs)
            yield Piece(text=text, token_id=token_id, logprob=chosen, top_logprobs=top)
        if len(generated) == 1:  # however long whoever got the first token took to keep the prompt's rows
            decoding = time.perf_counter()
        if matcher.stopped:
            finish_reason = "stop"
            break
        if constraint is not None and constraint.finished:
            finish_reason = "end"
            break
        if len(generated) == most:
            finish_reason = "length" if options.max_tokens else "context"
            break
        if decoder.position < engine.capacity:
            logits = decoder.step(token_id, most=most - len(generated) - 1)
            continue
        if not options.context_shift:
            finish_reason = "context"
            break
        ids = decoder.shifted(token_id, options.keep_tokens)
        shifted += engine.capacity + 1 - len(ids)
        logits = yield from _run(engine, ids[engine.reuse(ids) :], cancelled)
    decoder.finish()

    rest = "" if matcher.stopped else matcher.push(detokenizer.flush()) + matcher.flush()
    if rest:
        yield Piece(text=rest, token_id=None)
    yield GenerationStats(
        prompt_tokens=len(prompt_ids),
        cached_tokens=cached,
        generated_ids=tuple(generated),
        prefill_seconds=prefilled - started,
        decode_seconds=time.perf_counter() - decoding,
        finish_reason=finish_reason,
        ended_by=ended_by,
        drafted_tokens=decoder.drafted,
        accepted_tokens=decoder.accepted,
        shifted_tokens=shifted,
    )


def _run(
    engine: Engine, ids: Sequence[int], cancelled: Callable[[], bool]
) -> Generator[PromptProgress, None, npt.NDArray[np.float32] | None]:
    """Append `ids` to the cache -> logits for the token after them; None where that was cancelled."""
    total = engine.position + len(ids)
    logits: npt.NDArray[np.float32] | None = None
    for start in range(0, len(ids), PREFILL_CHUNK):
        if cancelled():
            return None
        logits = engine.forward(ids[start : start + PREFILL_CHUNK])
        yield PromptProgress(done=engine.position, total=total)
    return logits


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
