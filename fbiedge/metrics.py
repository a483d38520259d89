"""What a lossy step cost: numbers that compare the logits of two engines on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """Loss of a candidate against a reference over some positions of a text."""

    max_abs_error: float  # largest difference of any logit
    kl_divergence: float  # KL(reference || candidate), mean over positions, in nats
    top1_agreement: float  # share of positions with the same most likely token, 0 to 1
    positions: int


def compare_logits(reference: npt.NDArray[np.floating], candidate: npt.NDArray[np.floating]) -> LogitComparison:
    """Compare logits [..., vocab] position by position, in float64. Raises ValueError where shapes differ or are empty."""
    if reference.shape != candidate.shape or reference.ndim < 1 or reference.size == 0:
        raise ValueError(f"logits have shapes {reference.shape} and {candidate.shape}; expected the same [..., vocab]")
    vocab = reference.shape[-1]
    expected_rows, got_rows = reference.reshape(-1, vocab), candidate.reshape(-1, vocab)
    max_abs_error, divergence, agreeing = 0.0, 0.0, 0
    for expected, got in zip(expected_rows, got_rows, strict=True):  # by rows: float64 copies of all would be large
        log_p, log_q = _log_softmax(expected), _log_softmax(got)
        # np.maximum, unlike max(), keeps a NaN: a broken candidate must not look perfect.
        max_abs_error = float(np.maximum(max_abs_error, np.abs(expected - got.astype(np.float64)).max()))
        divergence += float(np.sum(np.exp(log_p) * (log_p - log_q)))
        agreeing += int(expected.argmax() == got.argmax())
    positions = len(expected_rows)
    return LogitComparison(
        max_abs_error=max_abs_error,
        kl_divergence=divergence / positions,
        top1_agreement=agreeing / positions,
        positions=positions,
    )


def perplexity(logits: npt.NDArray[np.floating], targets: npt.NDArray[np.integer]) -> float:
    """exp of the mean of -log p(target): logits [T, vocab] against the token ids [T] that followed."""
    if len(logits) != len(targets) or len(logits) == 0:
        raise ValueError(f"got {len(logits)} rows of logits for {len(targets)} targets; expected equal counts above 0")
    losses = [-_log_softmax(row)[target] for row, target in zip(logits, targets, strict=True)]
    return float(np.exp(np.mean(losses)))


def _log_softmax(row: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    shifted = row.astype(np.float64) - np.float64(row.max())
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
