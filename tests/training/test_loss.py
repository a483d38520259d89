"""The losses and their gradients, against their definitions written out with all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fbiedge.training.loss import Losses, head_losses

P, H, V = (3, 7), 6, 11  # 21 positions
CHUNKS = (1, 4, 21, 1000)


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Student's features and head, targets, teacher's features and head."""
    random = torch.Generator().manual_seed(seed)
    features, head = torch.randn(*P, H, generator=random), torch.randn(V, H, generator=random)
    teacher = torch.randn(*P, 2 * H, generator=random), torch.randn(V, 2 * H, generator=random)
    targets = torch.randint(0, V, P, generator=random)
    return features.requires_grad_(), head.requires_grad_(), targets, teacher


def whole(
    features: Tensor, head: Tensor, targets: Tensor, teacher: tuple[Tensor, Tensor], share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: loss, one-hot and distillation."""
    log_p = F.linear(features, head).float().log_softmax(-1)
    one_hot = -log_p.gather(-1, targets[..., None]).mean()
    t = F.linear(*teacher).float().softmax(-1)
    distillation = -(t * log_p).sum(-1).mean()
    return share * one_hot + (1 - share) * distillation, one_hot, distillation


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_losses_and_gradients_are_those_of_the_definition(share: float, chunk: int) -> None:
    features, head, targets, teacher = problem()
    expected = whole(features, head, targets, teacher, share)
    wanted = torch.autograd.grad(expected[0] * 3, (features, head))
    found = head_losses(features, head, targets, teacher=teacher, one_hot_share=share, chunk=chunk)
    assert found.distillation is not None
    torch.testing.assert_close(found, Losses(*expected), atol=1e-6, rtol=1e-6)
    gradients = torch.autograd.grad(found.loss * 3, (features, head))
    torch.testing.assert_close(gradients, wanted, atol=1e-6, rtol=1e-5)


def test_without_a_teacher_the_loss_is_one_hot() -> None:
    features, head, targets, teacher = problem(1)
    found = head_losses(features, head, targets, chunk=5)
    assert found.distillation is None and found.loss == found.one_hot
    torch.testing.assert_close(found.loss, F.cross_entropy((features @ head.T).flatten(0, -2), targets.flatten()))
    (gradient,) = torch.autograd.grad(found.loss, features)
    (wanted,) = torch.autograd.grad(whole(features, head, targets, teacher, 1.0)[0], features)
    torch.testing.assert_close(gradient, wanted)


def test_under_autocast_gradients_are_as_far_from_float32_as_the_definitions() -> None:
    features, head, targets, teacher = problem(2)
    exact = torch.autograd.grad(whole(features, head, targets, teacher, 0.0)[0], (features, head))
    with torch.autocast("cpu", torch.bfloat16):
        naive = torch.autograd.grad(whole(features, head, targets, teacher, 0.0)[0], (features, head))
        found = head_losses(features, head, targets, teacher=teacher, chunk=4)
    chunked = torch.autograd.grad(found.loss, (features, head))
    for ours, theirs, right in zip(chunked, naive, exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert (ours - right).norm() < 1.2 * (theirs - right).norm() + 1e-3 * right.norm()


def test_under_autocast_products_alone_are_rounded() -> None:
    """Losses as the definition has them from the same logits: one hundred thousandth, where bf16 has three digits."""
    random = torch.Generator().manual_seed(6)
    features, head = torch.randn(*P, 32, generator=random), torch.randn(500, 32, generator=random)
    teacher = torch.randn(*P, 32, generator=random), torch.randn(500, 32, generator=random)
    targets = torch.randint(0, 500, P, generator=random)
    with torch.autocast("cpu", torch.bfloat16):
        expected = whole(features, head, targets, teacher, 0.5)
        found = head_losses(features, head, targets, teacher=teacher, one_hot_share=0.5, chunk=8)
    torch.testing.assert_close(found, Losses(*expected), atol=0, rtol=1e-5)


def test_a_student_equal_to_its_teacher_reaches_the_teachers_entropy_and_no_less() -> None:
    features, head, targets, _ = problem(3)
    logits = F.linear(features, head)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    own = head_losses(features, head, targets, teacher=(features.detach(), head.detach()), chunk=8)
    assert own.distillation is not None
    torch.testing.assert_close(own.distillation, entropy.detach())
    other = head_losses(features + 0.5, head, targets, teacher=(features.detach(), head.detach()), chunk=8)
    assert other.distillation is not None and other.distillation > entropy


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    features, head, targets, teacher = problem(4)
    found = head_losses(features, head.detach(), targets, teacher=teacher, chunk=6)
    found.loss.backward()
    assert features.grad is not None and head.grad is None
    products: list[object] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products.extend([func] if "mm" in str(func) else [])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Counted():
        assert not head_losses(features, torch.nn.Parameter(head.detach()), targets, chunk=21).loss.requires_grad
    assert len(products) == 1  # the logits, and no gradient
