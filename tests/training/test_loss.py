"""The distillation loss, against its definition and its known gradient."""

from __future__ import annotations

import torch

from fbiedge.training.loss import distillation_loss, next_token_loss


def test_distillation_loss_is_the_cross_entropy_against_the_teachers_softmax() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64), torch.randn(2, 5, 11, dtype=torch.float64)
    expected = 0.0
    for b in range(2):
        for t in range(5):
            p, q = teacher[b, t].softmax(0), student[b, t].softmax(0)
            expected -= sum(float(p[v]) * float(q[v].log()) for v in range(11)) / 10
    assert abs(distillation_loss(student, teacher).item() - expected) < 1e-6


def test_its_gradient_is_the_difference_of_the_two_softmaxes() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(3, 4, 9, requires_grad=True), torch.randn(3, 4, 9)
    distillation_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 12)


def test_a_student_equal_to_its_teacher_reaches_the_teachers_entropy_and_no_less() -> None:
    torch.manual_seed(2)
    teacher = torch.randn(1, 6, 8)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(teacher, teacher), entropy)
    assert distillation_loss(teacher + torch.randn(1, 6, 8), teacher) > entropy


def test_a_certain_teacher_makes_it_the_next_token_loss() -> None:
    torch.manual_seed(3)
    student, targets = torch.randn(2, 7, 5), torch.randint(0, 5, (2, 7))
    certain = torch.nn.functional.one_hot(targets, 5) * 1000.0
    torch.testing.assert_close(distillation_loss(student, certain), next_token_loss(student, targets))
