"""compare_logits against values worked out by hand and by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fbiedge import metrics
from fbiedge.metrics import ComparisonSum, compare_logits, perplexity, token_losses


def test_equal_logits_lose_nothing() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    comparison = compare_logits(logits, logits)
    assert (comparison.max_abs_error, comparison.top1_agreement, comparison.positions) == (0.0, 1.0, 5)
    assert comparison.kl_divergence == pytest.approx(0.0, abs=1e-15)


def test_known_divergence() -> None:
    """KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln 3/2 + 1/4 ln 1/2; a shift of all logits changes no probability."""
    reference = np.log(np.array([[0.75, 0.25], [0.25, 0.75]]))
    candidate = np.array([[3.0, 3.0], [3.0, 3.0]])
    comparison = compare_logits(reference, candidate)
    assert comparison.kl_divergence == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert comparison.max_abs_error == pytest.approx(3 - np.log(0.25))
    assert comparison.top1_agreement == 0.5  # arg max of a tie is the first


def test_divergence_equals_torch() -> None:
    generator = np.random.default_rng(0)
    reference, candidate = generator.normal(0, 30, (2, 4, 9, 50)).astype(np.float32)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(torch.from_numpy(candidate).double(), -1),
        torch.log_softmax(torch.from_numpy(reference).double(), -1),
        reduction="none",
        log_target=True,
    )
    comparison = compare_logits(reference, candidate)
    assert comparison.kl_divergence == pytest.approx(expected.sum(-1).mean().item())
    assert comparison.positions == 36


def test_a_broken_candidate_does_not_look_perfect() -> None:
    reference = np.zeros((2, 3), np.float32)
    candidate = reference.copy()
    candidate[0, 1] = np.nan
    comparison = compare_logits(reference, candidate)
    assert np.isnan(comparison.max_abs_error) and np.isnan(comparison.kl_divergence)


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (0, 3)])
def test_shapes_that_cannot_be_compared(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected the same"):
        compare_logits(np.zeros((2, 3) if shape[0] else (0, 3), np.float32), np.zeros(shape, np.float32))


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However logits are split, and however many rows are taken at a time."""
    generator = np.random.default_rng(0)
    reference, candidate = generator.normal(0, 3, (2, 9, 50)).astype(np.float32)
    expected = compare_logits(reference, candidate)
    parts = ComparisonSum()
    for start, end in ((0, 1), (1, 6), (6, 9)):
        parts.add(reference[start:end], candidate[start:end])
    monkeypatch.setattr(metrics, "_CELLS", 120)
    for got in (parts.result(), compare_logits(reference, candidate)):
        assert got.kl_divergence == pytest.approx(expected.kl_divergence)
        assert (got.max_abs_error, got.top1_agreement, got.positions) == (
            expected.max_abs_error, expected.top1_agreement, expected.positions,
        )  # fmt: skip


def test_token_losses_equal_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(0, 30, (20, 11)).astype(np.float32), generator.integers(0, 11, 20)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    np.testing.assert_allclose(token_losses(logits, targets), expected.numpy(), rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(metrics, "_CELLS", 40)
    np.testing.assert_allclose(token_losses(logits, list(targets)), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_perplexity_equals_torch() -> None:
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(0, 3, (20, 11)).astype(np.float32), generator.integers(0, 11, 20)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))
    assert perplexity(logits, targets) == pytest.approx(loss.exp().item(), rel=1e-5)
    with pytest.raises(ValueError, match="expected equal counts"):
        perplexity(logits, targets[1:])
