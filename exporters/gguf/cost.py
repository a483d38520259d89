"""What a GGUF costs: its logits, with the adapter and without, against those of the weights it was made from.

Both are computed by the numpy reference, so this is the loss of the stored form alone. llama.cpp adds a little of its own:
it rounds the inputs of each linear to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fbiedge.errors import UsageError
from fbiedge.metrics import ComparisonSum, token_losses
from fbiedge.reference import Reference
from fbiedge.weights import Weights

from .folded import DenseWeights, FoldedModel
from .plan import matrix_parameters

RESIDENT_LIMIT_BYTES = 2 * 1000**3  # of dense float32 weights; above it, tensors are read as they are needed
_MULTIPLY_ADDS = 100 * 1000**3  # of one pass: a few seconds of numpy on two cores
_FEWEST_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Loss of one form of a model over some positions of a text."""

    kl_divergence: float  # KL(checkpoint || GGUF), mean over positions, in nats
    top1_agreement: float  # 0 to 1
    max_logit_error: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A GGUF on a text."""

    tokens: int
    perplexity: float  # of the checkpoint
    with_adapter: Cost
    without_adapter: Cost | None  # None where there is no adapter


def is_resident(weights: Weights) -> bool:
    """Whether the dense weights may stay in memory."""
    return 4 * matrix_parameters(weights.config) <= RESIDENT_LIMIT_BYTES


def measure(model: FoldedModel, ids: Sequence[int], *, has_adapter: bool) -> Costs:
    """Costs on `ids`, cut to what is affordable. Raises UsageError for fewer than two tokens."""
    weights = model.weights
    affordable = max(_FEWEST_TOKENS, _MULTIPLY_ADDS // matrix_parameters(weights.config))
    ids = list(ids)[:affordable]
    if len(ids) < 2:
        raise UsageError("measuring needs a text of at least two tokens")
    expected = list(_logits(weights, ids))
    forms = [DenseWeights(model=model), *([DenseWeights(model=model, adapter=False)] if has_adapter else [])]
    costs = [_cost(expected, list(_logits(form, ids)), ids) for form in forms]
    return Costs(
        tokens=len(ids),
        perplexity=_perplexity(expected, ids),
        with_adapter=costs[0],
        without_adapter=costs[1] if has_adapter else None,
    )


def _logits(weights: Weights, ids: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
    """Logits [tokens, vocab] of each window of the context."""
    reference = Reference(weights, resident=is_resident(weights))
    window = weights.config.max_position_embeddings
    for start in range(0, len(ids), window):
        reference.reset()
        yield reference.logits(ids[start : start + window])


def _cost(
    expected: Sequence[npt.NDArray[np.float32]], got: Sequence[npt.NDArray[np.float32]], ids: Sequence[int]
) -> Cost:
    total = ComparisonSum()
    for reference, candidate in zip(expected, got, strict=True):
        total.add(reference, candidate)
    loss = total.result()
    return Cost(
        kl_divergence=loss.kl_divergence,
        top1_agreement=loss.top1_agreement,
        max_logit_error=loss.max_abs_error,
        perplexity=_perplexity(got, ids),
    )


def _perplexity(parts: Sequence[npt.NDArray[np.float32]], ids: Sequence[int]) -> float:
    losses, start = [], 0
    for logits in parts:
        if len(logits) > 1:
            losses.append(token_losses(logits[:-1], ids[start + 1 : start + len(logits)]))
        start += len(logits)
    return float(np.exp(np.concatenate(losses).mean()))
