"""The two objectives, next-token cross-entropy and autoregressive distillation, computed with the head in chunks.

For one position with the student's probabilities p, the teacher's t and the next token's one-hot vector o:

    one-hot        - sum_v o_v · log p_v            what teachers learn
    distillation   - sum_v t_v · log p_v            what binary students learn; no temperature, as published
    loss           (1 - share) · distillation + share · one-hot, averaged over positions

Its gradient by the student's logits is p - (1 - share) · t - share · o, so one pass over the positions, `chunk` of them at
a time, gives both the loss and its gradients by the features and by the head. Logits [positions, V] are never held whole:
a 130M model on 16 x 2048 tokens would need 4.2 GB for the student's alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Losses(NamedTuple):
    """In nats per position. `loss` alone carries gradients."""

    loss: Tensor
    one_hot: Tensor
    distillation: Tensor | None  # None without a teacher


def head_losses(
    features: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    one_hot_share: float = 0.0,
    chunk: int,
) -> Losses:
    """The losses of a student with `features` [..., H] and the head's weight [V, H], for the next tokens `targets` [...].

    teacher: features [..., H'] and head [V, H'] of a model with the same vocabulary; without one the loss is one-hot.
    Products are in the dtype of autocast where it is on; softmax, losses and their sums are fp32. The floor of
    distillation is the teacher's entropy, not zero.
    """
    if not torch.is_grad_enabled():  # a Parameter would ask the function for its gradient all the same
        features, head = features.detach(), head.detach()
    if teacher is not None:
        guide, guide_head = teacher
        teacher = guide.flatten(0, -2), guide_head
    loss, one_hot, distillation = _HeadLosses.apply(  # type: ignore[no-untyped-call]
        features.flatten(0, -2), head, targets.flatten(), teacher, one_hot_share if teacher else 1.0, chunk
    )
    return Losses(loss, one_hot, distillation if teacher else None)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,  # [P, H]
        head: Tensor,  # [V, H]
        targets: Tensor,  # [P]
        teacher: tuple[Tensor, Tensor] | None,
        one_hot_share: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind, positions = features.device.type, len(features)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        weight = head.to(dtype)
        guide_weight = teacher[1].to(dtype) if teacher else None
        wants_features, wants_head = ctx.needs_input_grad[:2]
        grad_features = torch.empty_like(features) if wants_features else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        sums = features.new_zeros(2, dtype=torch.float32)  # of one-hot and distillation
        for start in range(0, positions, chunk):
            rows = slice(start, start + chunk)
            part, wanted = features[rows].to(dtype), targets[rows, None]
            logits = F.linear(part, weight).float()  # [C, V]
            p = logits.softmax(-1)
            # log of the sum of exp(logits), from the most likely token; logsumexp takes 8 times as long on a CPU
            highest, at = logits.max(-1)
            normalizer = highest - p.gather(1, at[:, None]).squeeze(1).log()
            sums[0] += (normalizer - logits.gather(1, wanted).squeeze(1)).sum()
            target = None
            if teacher is not None and guide_weight is not None:
                target = F.linear(teacher[0][rows].to(dtype), guide_weight).float().softmax(-1)
                with torch.autocast(kind, enabled=False):  # which would round both to its dtype
                    sums[1] += (normalizer - torch.linalg.vecdot(target, logits)).sum()
            if grad_features is None and grad_head is None:
                continue
            if target is not None:
                p.sub_(target, alpha=1 - one_hot_share)
            p.scatter_add_(1, wanted, p.new_full(wanted.shape, -one_hot_share))
            gradient = p.div_(positions).to(dtype)
            if grad_features is not None:
                grad_features[rows] = gradient @ weight
            if grad_head is not None:
                grad_head += gradient.T @ part
        one_hot, distillation = sums / positions
        ctx.save_for_backward(grad_features, grad_head)
        ctx.mark_non_differentiable(one_hot, distillation)
        loss = one_hot_share * one_hot
        return loss + (1 - one_hot_share) * distillation if teacher is not None else loss, one_hot, distillation

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        by_features, by_head = ctx.saved_tensors
        scaled = (None if by is None else (by * grad[0]) for by in (by_features, by_head))
        return (*scaled, None, None, None, None)
