"""Algorithm 1 of the sREPA paper as it is printed."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.gram.losses import off_diagonal


def algorithm_1(
    student_tokens: torch.Tensor,
    teacher_tokens: torch.Tensor,
    mode: str = "mse",
    tau_teacher: float = 0.2,
    tau_student: float = 0.2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses of the paper's Algorithm 1, unweighted, with its own normalisation and reductions.

    Args:
        student_tokens (`torch.Tensor`): raw projected tokens of shape `(B, N, D)`.
        teacher_tokens (`torch.Tensor`): raw tokens of shape `(B, N, D)`.
        mode (`str`): `"mse"` or `"kl"`.
        tau_teacher (`float`): temperature of the teacher's softmax.
        tau_student (`float`): temperature of the student's softmax.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: projection loss and structural loss, two scalars over the batch. The KL
        value is N times Eq. 8, because `batchmean` divides by the batch size alone.
    """
    teacher = F.normalize(teacher_tokens.detach(), dim=-1)
    student = F.normalize(student_tokens, dim=-1)
    projection_loss = -(teacher * student).sum(dim=-1).mean()
    teacher_gram = off_diagonal(torch.bmm(teacher, teacher.transpose(1, 2)))
    student_gram = off_diagonal(torch.bmm(student, student.transpose(1, 2)))
    if mode == "mse":
        return projection_loss, F.mse_loss(student_gram, teacher_gram)
    probabilities = F.softmax(teacher_gram / tau_teacher, dim=-1)
    log_probabilities = F.log_softmax(student_gram / tau_student, dim=-1)
    return projection_loss, F.kl_div(log_probabilities, probabilities, reduction="batchmean")
