"""What a lossy step cost: numbers that compare the logits of two engines on the same tokens, and the loss of one.

Everything is summed in float64, row by row or a few rows at a time, so that logits may come in parts and no copy of all
is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_CELLS = 1 << 20  # of one float64 copy of rows: 8 MB


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """Loss of a candidate against a reference over some positions of a text."""

    max_abs_error: float  # largest difference of any logit
    kl_divergence: float  # KL(reference || candidate), mean over positions, in nats
    top1_agreement: float  # share of positions with the same most likely token, 0 to 1
    positions: int


class ComparisonSum:
    """Adds up a LogitComparison from logits that come in parts."""

    def __init__(self) -> None:
        self._max_abs_error = self._divergence = 0.0
        self._agreeing = self._positions = 0

    def add(self, reference: npt.NDArray[np.floating], candidate: npt.NDArray[np.floating]) -> None:
        """Logits [..., vocab] of the same positions. Raises ValueError where shapes differ or are empty."""
        if reference.shape != candidate.shape or reference.ndim < 1 or reference.size == 0:
            raise ValueError(
                f"logits have shapes {reference.shape} and {candidate.shape}; expected the same [..., vocab]"
            )
        vocab = reference.shape[-1]
        expected_rows, got_rows = reference.reshape(-1, vocab), candidate.reshape(-1, vocab)
        for start in range(0, len(expected_rows), step := max(1, _CELLS // vocab)):
            expected = expected_rows[start : start + step].astype(np.float64)
            got = got_rows[start : start + step].astype(np.float64)
            log_p, log_q = _log_softmax(expected), _log_softmax(got)
            # np.maximum, unlike max(), keeps a NaN: a broken candidate must not look perfect.
            self._max_abs_error = float(np.maximum(self._max_abs_error, np.abs(expected - got).max()))
            self._divergence += float(np.sum(np.exp(log_p) * (log_p - log_q)))
            self._agreeing += int((expected.argmax(axis=-1) == got.argmax(axis=-1)).sum())
            self._positions += len(expected)

    def result(self) -> LogitComparison:
        """Of all that was added, which must be something."""
        return LogitComparison(
            max_abs_error=self._max_abs_error,
            kl_divergence=self._divergence / self._positions,
            top1_agreement=self._agreeing / self._positions,
            positions=self._positions,
        )


def compare_logits(reference: npt.NDArray[np.floating], candidate: npt.NDArray[np.floating]) -> LogitComparison:
    """Compare logits [..., vocab] position by position. Raises ValueError where shapes differ or are empty."""
    comparison = ComparisonSum()
    comparison.add(reference, candidate)
    return comparison.result()


def token_losses(logits: npt.NDArray[np.floating], targets: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """-log p(target) in nats, float64 [T]: logits [T, vocab] against the token ids [T] that followed."""
    wanted = np.asarray(targets, np.int64)
    if len(logits) != len(wanted) or len(logits) == 0:
        raise ValueError(f"got {len(logits)} rows of logits for {len(wanted)} targets; expected equal counts above 0")
    losses = np.empty(len(wanted))
    for start in range(0, len(wanted), step := max(1, _CELLS // logits.shape[-1])):
        rows = _log_softmax(logits[start : start + step].astype(np.float64))
        losses[start : start + step] = -np.take_along_axis(rows, wanted[start : start + step, None], axis=-1)[:, 0]
    return losses


def perplexity(logits: npt.NDArray[np.floating], targets: npt.NDArray[np.integer]) -> float:
    """exp of the mean of -log p(target): logits [T, vocab] against the token ids [T] that followed."""
    return float(np.exp(token_losses(logits, targets).mean()))


def _log_softmax(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the last axis."""
    result: npt.NDArray[np.float64] = rows - rows.max(axis=-1, keepdims=True)
    result -= np.log(np.exp(result).sum(axis=-1, keepdims=True))
    return result
