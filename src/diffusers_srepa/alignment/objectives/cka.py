"""Centred kernel alignment of the tokens of each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffusers_srepa.alignment.objectives.base import AlignmentObjective


NEGLIGIBLE_SPREAD = 1e-6
"""Rows whose spread about their mean is below this share of their size count as equal."""


@dataclass(frozen=True)
class CKAAlignment(AlignmentObjective):
    """`1 - CKA` of the tokens of each sample; in [0, 1].

    Linear CKA (Kornblith et al., arXiv 1905.00414): with centred features, `|Y'X|^2 / (|X'X| |Y'Y|)`. Blind to
    rotations and to the scale of the features; widths may differ. Where all tokens of a side are equal it is 1, with
    no gradient.
    """

    min_tokens: ClassVar[int] = 2

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 1.0 - linear_cka(student, target)


def linear_cka(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Linear CKA of rows `(..., N, D_S)` and `(..., N, D_T)`: shape `(...)`, in [0, 1]; 0 where one side is constant.

    Through N x N kernels or D x D covariances, whichever are smaller.
    """
    student, target = _centre_and_scale(student), _centre_and_scale(target)
    if student.shape[-2] <= max(student.shape[-1], target.shape[-1]):
        student_kernel, target_kernel = student @ student.mT, target @ target.mT
        cross = (student_kernel * target_kernel).sum(dim=(-2, -1))
        scales = _squared_norm(student_kernel) * _squared_norm(target_kernel)
    else:
        cross = _squared_norm(target.mT @ student)
        scales = _squared_norm(student.mT @ student) * _squared_norm(target.mT @ target)
    is_zero = scales == 0
    return torch.where(is_zero, torch.zeros_like(cross), cross / torch.where(is_zero, 1.0, scales).sqrt())


def _centre_and_scale(rows: torch.Tensor) -> torch.Tensor:
    """Rows minus their mean, scaled to Frobenius norm 1, which CKA does not see; zero where the rows are equal."""
    centred = rows - rows.mean(dim=-2, keepdim=True)
    size = torch.linalg.matrix_norm(rows.detach(), keepdim=True)
    spread = torch.linalg.matrix_norm(centred, keepdim=True)
    is_constant = spread <= NEGLIGIBLE_SPREAD * size
    scale = torch.where(is_constant, 0.0, 1.0 / torch.where(is_constant, 1.0, spread))
    return centred * scale


def _squared_norm(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.square().sum(dim=(-2, -1))
