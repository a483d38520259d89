"""What a GGUF costs: its logits, with the adapter and without, against those of the weights it was made from.

All are computed by the numpy reference, so this is the loss of the stored form alone. llama.cpp adds a little of its own:
it rounds the inputs of each linear to 8 bits. Where it is installed, a finished file of a model that isn't too large is
also run there before it appears.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fbiedge.errors import ModelFileError, OutputError, UsageError
from fbiedge.llama_cpp_library import load_library
from fbiedge.llama_cpp_session import LlamaCppSession
from fbiedge.metrics import ComparisonSum, token_losses
from fbiedge.reference import RESIDENT_LIMIT_BYTES, Reference
from fbiedge.weights import Weights

from ..onnx.verify import matrix_parameters
from .folded import DenseWeights, FoldedModel
from .storage import GgufOptions

_MULTIPLY_ADDS = 100 * 1000**3  # of one pass: a few seconds of numpy on two cores
_FEWEST_TOKENS = 16
_WRONG_ABOVE_NATS = 0.1  # rounding to 8 bits costs 3e-5 in a trained model, 5e-3 in a tiny random one


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
    perplexity: float  # of the source
    with_adapter: Cost
    without_adapter: Cost | None  # None where there is no adapter
    in_llama_cpp: Cost | None = None  # of the file itself, with its adapter; None where it wasn't run
    not_run: str | None = None  # in llama.cpp, and why


def is_resident(weights: Weights) -> bool:
    """Whether the dense weights may stay in memory."""
    return 4 * matrix_parameters(weights.config) <= RESIDENT_LIMIT_BYTES


def why_not_in_llama_cpp(weights: Weights) -> str | None:
    """Why a file isn't run in llama.cpp before it appears, None where it is."""
    if not is_resident(weights):
        return f"models of more than {RESIDENT_LIMIT_BYTES / 1e9:.0f} GB in float32 are not run there"
    try:
        load_library()
    except UsageError as error:
        return str(error)
    return None


class Expected:
    """The logits of the source on a text, cut to what is affordable: what a GGUF is compared with."""

    def __init__(self, weights: Weights, ids: Sequence[int]) -> None:
        """Raises UsageError for fewer than two tokens."""
        affordable = max(_FEWEST_TOKENS, _MULTIPLY_ADDS // matrix_parameters(weights.config))
        self.weights, self.ids = weights, list(ids)[:affordable]
        if len(self.ids) < 2:
            raise UsageError("measuring needs a text of at least two tokens")
        self._logits = list(_logits(weights, self.ids))

    def costs(self, model: FoldedModel, options: GgufOptions, *, has_adapter: bool) -> Costs:
        """Of the folded model, in numpy."""
        forms = [
            DenseWeights(model=model, options=options, adapter=adapter)
            for adapter in ((True, False) if has_adapter else (True,))
        ]
        costs = [_cost(self._logits, list(_logits(form, self.ids)), self.ids) for form in forms]
        return Costs(
            tokens=len(self.ids),
            perplexity=_perplexity(self._logits, self.ids),
            with_adapter=costs[0],
            without_adapter=costs[1] if has_adapter else None,
        )

    def check_in_llama_cpp(self, path: Path, allowed_kl: float, *, shown_as: Path) -> Cost:
        """Of the finished file; `shown_as` is the name that a user knows.

        Raises OutputError where llama.cpp refuses it or computes another model.
        """
        try:
            got = self._in_llama_cpp(path)
        except (ModelFileError, UsageError) as error:
            reason = str(error).replace(str(path.parent / path.stem), str(shown_as.with_suffix("")))
            raise OutputError(f"llama.cpp refuses the export to {shown_as}, and it was dropped: {reason}") from error
        cost = _cost(self._logits, got, self.ids)
        if not (cost.kl_divergence <= allowed_kl + _WRONG_ABOVE_NATS and isfinite(cost.max_logit_error)):
            raise OutputError(
                f"the export to {shown_as} came out wrong and was dropped: in llama.cpp its KL divergence is "
                f"{cost.kl_divergence:.3g} nats, expected at most {allowed_kl:.3g} and what rounding inputs to 8 bits costs"
            )
        return cost

    def _in_llama_cpp(self, path: Path) -> list[npt.NDArray[np.float32]]:
        session = LlamaCppSession.open(path, context=max(map(len, self._logits)))
        got: list[npt.NDArray[np.float32]] = []
        start = 0
        for window in self._logits:
            session.truncate(0)
            got.append(session.all_logits(self.ids[start : start + len(window)]))
            start += len(window)
        return got


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
