"""From logits to the next token.

The steps and their order are those of Hugging Face's logits processors:

    bias -> repetition penalty -> constraint -> temperature -> top-k -> top-p -> min-p -> draw

(llama.cpp truncates before the temperature; with temperature 1 the two agree.) Temperature 0 is greedy: the largest
logit after the repetition penalty, the lowest id among equals. Every truncation keeps at least the most likely token,
and breaks ties in favour of the lower id, so that a seed gives the same text everywhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import ModelFileError, UsageError

if TYPE_CHECKING:
    from .constraint import ConstraintState

PENALTY_WINDOW = 64  # the repetition penalty looks this many tokens back, as llama.cpp's repeat_last_n


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to pick a token. Raises UsageError for a value that can't be used."""

    temperature: float = 0.8  # 0 is greedy
    top_k: int = 40  # keep the k most likely; 0 keeps all
    top_p: float = 0.95  # keep the smallest set of most likely tokens that reaches this probability; 1 keeps all
    min_p: float = 0.05  # keep what has at least this share of the most likely token's probability; 0 keeps all
    repetition_penalty: float = 1.0  # 1 is none; divides positive and multiplies negative logits of recent tokens
    seed: int | None = None  # None draws one

    def __post_init__(self) -> None:
        # Beyond these bounds a temperature or a penalty only makes logits overflow.
        for name, low, high, wants in (
            ("temperature", 1e-30, 1e6, "0 (greedy) or a number from 1e-30 to 1e6"),
            ("top_p", 0.0, 1.0, "a number from 0 to 1"),
            ("min_p", 0.0, 1.0, "a number from 0 to 1"),
            ("repetition_penalty", 0.01, 100.0, "a number from 0.01 to 100 (1 is no penalty)"),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            greedy = name == "temperature" and value == 0
            if not number or not (greedy or low <= value <= high):  # also false for NaN
                raise UsageError(f"{name} is {value!r}, expected {wants}")
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UsageError(f"{name} is {value!r}, expected a whole number of at least 0")

    @classmethod
    def from_generation_config(cls, raw: dict[str, Any], **overrides: Any) -> SamplingOptions:
        """What the model's generation_config.json recommends; `overrides` that are not None win. Raises UsageError."""
        known = {entry.name for entry in fields(cls)}
        chosen = {name: value for name, value in raw.items() if name in known and value is not None}
        if raw.get("do_sample") is False:
            chosen["temperature"] = 0.0
        chosen |= {name: value for name, value in overrides.items() if value is not None}
        return cls(**chosen)


class Sampler:
    """Draws tokens by `options`; with a seed, the same logits give the same tokens."""

    def __init__(
        self,
        options: SamplingOptions,
        *,
        logit_bias: Mapping[int, float] | None = None,
        constraint: ConstraintState | None = None,
    ) -> None:
        """logit_bias: added to the logits of these tokens. constraint: what may come next; it is told what is drawn."""
        self.options = options
        self._random = random.Random(options.seed)  # NumPy's generators take 2 MB of memory
        self._biased = np.array(list(logit_bias or ()), np.int64)
        self._bias = np.array(list((logit_bias or {}).values()), np.float32)
        self._constraint = constraint

    def sample(self, logits: npt.NDArray[np.float32], context: Sequence[int] = ()) -> int:
        """The next token for `logits` [vocab] after the tokens `context`.

        Raises ModelFileError for NaN or Inf, UsageError where the constraint can't be kept to.
        """
        options = self.options
        if len(self._biased):
            logits = logits.copy()
            logits[self._biased] += self._bias
        if options.repetition_penalty != 1.0 and len(context):
            logits = penalize(logits, context[-PENALTY_WINDOW:], options.repetition_penalty)
        allowed = None
        if self._constraint is not None:  # from here on, the others aren't there: they need no sorting either
            allowed = np.flatnonzero(self._constraint.allowed())
            logits = logits[allowed]
        if not math.isfinite(logits.max()):
            raise ModelFileError(
                "the model computes NaN or Inf; its file is damaged or was exported from a broken checkpoint"
            )
        token_id = int(logits.argmax()) if options.temperature == 0 else self._draw(logits)
        if self._constraint is not None and allowed is not None:
            token_id = int(allowed[token_id])
            self._constraint.accept(token_id)
        return token_id

    def _draw(self, logits: npt.NDArray[np.float32]) -> int:
        tokens, weights = candidates(logits, self.options)
        cumulative = weights.cumsum()
        draw = self._random.random() * cumulative[-1]
        # The last token with any weight is the first that reaches the whole: rounding must draw none after it.
        last = int(cumulative.searchsorted(cumulative[-1]))
        return int(tokens[min(int(cumulative.searchsorted(draw, side="right")), last)])


def log_probabilities(
    logits: npt.NDArray[np.float32], token_id: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Logarithm of the probability of `token_id`, and the `count` most likely tokens with theirs, the likeliest first."""
    best = float(logits.max())
    total = best + math.log(np.exp(logits.astype(np.float64) - best).sum())
    likely = _largest(logits, min(count, len(logits)))
    order = likely[np.argsort(-logits[likely], kind="stable")]
    return float(logits[token_id]) - total, tuple((int(token), float(logits[token]) - total) for token in order)


def penalize(logits: npt.NDArray[np.float32], recent: Sequence[int], penalty: float) -> npt.NDArray[np.float32]:
    """A copy of `logits` [vocab] where every token of `recent` is made less likely, each once."""
    tokens = np.unique(np.asarray(recent, np.int64))
    penalized: npt.NDArray[np.float32] = logits.copy()
    chosen = penalized[tokens]
    with np.errstate(over="ignore"):  # an Inf is found by whoever picks from them
        penalized[tokens] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return penalized


def candidates(
    logits: npt.NDArray[np.float32], options: SamplingOptions
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Tokens left by top-k, top-p and min-p, most likely first, and their probabilities relative to the first's.

    Where nothing is cut off, in order of ids: sorting 32,000 tokens takes as long as a decode step of a small model.
    """
    vocab, best = len(logits), float(logits.max())
    tokens = _largest(logits, min(options.top_k or vocab, vocab))
    weights = np.exp((logits[tokens].astype(np.float64) - best) / options.temperature)
    reach = options.top_p * weights.sum()
    if len(tokens) == vocab and options.top_p == 1 and options.min_p == 0:
        return tokens, weights
    # min-p and top-p both keep the head of one order, so what min-p cuts off needn't be sorted first.
    keep = weights >= options.min_p
    tokens, weights = tokens[keep], weights[keep]
    if options.top_p < 1:
        head = 256  # nor what lies beyond top-p: take ever longer heads until one reaches it
        while head < len(tokens) and weights[_largest(weights, head)].sum() < reach:
            head *= 8
        chosen = _largest(weights, head)
        tokens, weights = tokens[chosen], weights[chosen]
    order = np.argsort(-weights, kind="stable")  # stable: `_largest` returns ids in ascending order
    tokens, weights = tokens[order], weights[order]
    if options.top_p < 1:
        more_likely = weights.cumsum() - weights  # what the tokens before have together
        keep = more_likely < reach
        keep[0] = True
        tokens, weights = tokens[keep], weights[keep]
    return tokens, weights


def _largest(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Positions of the `count` largest values, ascending; among equals the first."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.arange(0)
    positions = np.arange(len(values))
    blocks = len(values) // 32
    if blocks > 2 * count:
        # At least `count` values reach the count-th largest of the blocks' maxima, so all others are out. Finding that
        # takes a fifth of the time of partitioning 32,000 values.
        maxima = values[: 32 * blocks].reshape(blocks, 32).max(axis=1)
        positions = np.flatnonzero(values >= np.partition(maxima, blocks - count)[blocks - count])
        values = values[positions]
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: count - len(above)]
    return positions[np.sort(np.concatenate((above, equal)))]
