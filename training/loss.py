"""The two objectives: next-token cross-entropy (teachers) and autoregressive distillation (binary students)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [B, T, V] against token ids [B, T]."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Autoregressive distillation: cross-entropy of the student's [B, T, V] against the teacher's full softmax.

        loss = - mean over positions of  sum_v softmax(teacher)_v · log_softmax(student)_v

    No one-hot term and no temperature, as published. Its floor is the teacher's entropy, not zero.
    """
    target = torch.softmax(teacher.float(), dim=-1)
    return -(target * F.log_softmax(student.float(), dim=-1)).sum(-1).mean()
