"""Objectives that compare the relations between the tokens of each image: cosines, distances, centred kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.gram.losses import (
    KL_FORMS,
    KL_REDUCTIONS,
    MSE_FORMS,
    check_choice,
    compute_gram_kl,
    compute_gram_mse,
    cosine_gram,
)
from diffusers_srepa.alignment.objectives.base import AlignmentObjective, check_number


NEGLIGIBLE_SPREAD = 1e-6
"""Rows whose spread about their mean is below this share of their size count as equal."""


@dataclass(frozen=True)
class GramMSEAlignment(AlignmentObjective):
    """Mean squared difference of the token-to-token cosine similarities of student and target (sREPA Eq. 6).

    Student and target may differ in width, so no projector is needed.

    Args:
        form (`str`): which of the equivalent computations to use, see `gram_mse_loss`.
        include_prefix_tokens (`bool`): whether a class token takes part in the similarities.

    Raises:
        ValueError: `form` is unknown.
    """

    min_tokens: ClassVar[int] = 2

    form: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, MSE_FORMS)

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return compute_gram_mse(student, target, self.form)


@dataclass(frozen=True)
class GramKLAlignment(AlignmentObjective):
    """KL divergence of the student's neighbour distributions from the target's (sREPA Eq. 7 and 8).

    Each token's similarities to all others, divided by a temperature, become a distribution by softmax. Student and
    target may differ in width, so no projector is needed.

    Args:
        tau_teacher (`float`): temperature of the target's softmax, > 0.
        tau_student (`float`): temperature of the student's softmax, > 0.
        reduction (`str`): `"mean"` over tokens (Eq. 8) or `"batchmean"`, the N times larger value that the paper's
            Algorithm 1 gives when taken literally.
        form (`str`): which of the equivalent computations to use, see `gram_kl_loss`.
        include_prefix_tokens (`bool`): whether a class token takes part in the similarities.

    Raises:
        ValueError: a temperature is not positive, or `reduction` or `form` is unknown.
    """

    min_tokens: ClassVar[int] = 2

    tau_teacher: float = 0.2
    tau_student: float = 0.2
    reduction: str = "mean"
    form: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "tau_teacher", 0.0, open_end=True)
        check_number(self, "tau_student", 0.0, open_end=True)
        check_choice("reduction", self.reduction, KL_REDUCTIONS)
        check_choice("form", self.form, KL_FORMS)

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return compute_gram_kl(student, target, self.tau_teacher, self.tau_student, self.reduction, self.form)


@dataclass(frozen=True)
class PositiveGramAlignment(AlignmentObjective):
    """Mean over all N^2 pairs of the squared difference of cosine similarities, negative ones removed, per sample.

    The Gram anchoring of DINOv3 (Siméoni et al., arXiv 2508.10104) in the two variants of its released code. Unlike
    `GramMSEAlignment` the mean includes the diagonal, so that it is `(N - 1) / N` of the off-diagonal mean. Widths may
    differ.

    Args:
        remove (`str`): `"both"` sets negative similarities of either side to zero; a student's that is set to zero
            gets no gradient. `"teacher"` sets the teacher's alone to zero and draws the student's there. (The released
            code means to remove the student's where both are negative too, but compares with the teacher's when these
            are zero already, which removes none.)
        include_prefix_tokens (`bool`): whether class and register tokens take part.

    Raises:
        ValueError: `remove` is unknown.
    """

    min_tokens: ClassVar[int] = 2

    remove: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("remove", self.remove, ("both", "teacher"))

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        student_gram, target_gram = cosine_gram(student), cosine_gram(target)
        if self.remove == "both":
            student_gram = student_gram.masked_fill(student_gram < 0, 0.0)
        return (student_gram - target_gram.clamp(min=0)).square().mean(dim=(1, 2))


@dataclass(frozen=True)
class DistanceMarginAlignment(AlignmentObjective):
    """Mean over all N^2 pairs of `relu(|cos(s_i, s_j) - cos(t_i, t_j)| - margin)`, per sample.

    The marginal distance matrix similarity loss of VA-VAE (Yao et al., arXiv 2501.01423, its second VF loss): pairs
    within the margin are left alone. Widths may differ.

    Args:
        margin (`float`): m_2 of the paper, >= 0.
        include_prefix_tokens (`bool`): whether class and register tokens take part.

    Raises:
        ConfigurationError: `margin` is negative or no number.
    """

    min_tokens: ClassVar[int] = 2

    margin: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "margin", 0.0)

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        difference = cosine_gram(student) - cosine_gram(target)
        return F.relu(difference.abs() - self.margin).mean(dim=(1, 2))


@dataclass(frozen=True)
class RKDDistanceAlignment(AlignmentObjective):
    """Huber loss between the relative token distances of student and target, mean over `i != j`, per sample.

    RKD-D (Park et al., arXiv 1904.05068) with the tokens of an image in place of the images of a batch: a distance
    `|x_i - x_j|` is divided by the mean distance of all pairs, so the scale of the features does not matter. Widths
    may differ.
    """

    min_tokens: ClassVar[int] = 2

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        num_tokens = student.shape[1]
        # Distances of a token to itself are equal, 0, and add nothing to the sum.
        penalty = F.huber_loss(_relative_distances(student), _relative_distances(target), reduction="none")
        return penalty.sum(dim=(1, 2)) / (num_tokens * (num_tokens - 1))


def squared_distances(rows: torch.Tensor) -> torch.Tensor:
    """`|x_i - x_j|^2` of all pairs of rows `(..., N, D)`, shape `(..., N, N)`, through inner products.

    The diagonal is exactly 0, nothing is negative.
    """
    # Distances do not depend on the origin; near the mean the inner products lose the fewest digits.
    centred = rows - rows.mean(dim=-2, keepdim=True).detach()
    products = centred @ centred.mT
    norms = products.diagonal(dim1=-2, dim2=-1)
    distances = norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * products
    diagonal = torch.eye(rows.shape[-2], dtype=torch.bool, device=rows.device)
    return distances.masked_fill(diagonal, 0.0).clamp(min=0)


def _distances(rows: torch.Tensor) -> torch.Tensor:
    """`|x_i - x_j|` of all pairs `(..., N, N)`; coinciding rows have distance 0 and give each other no gradient."""
    squared = squared_distances(rows)
    # Below this, a squared distance is the rounding error of the inner products.
    floor = torch.finfo(rows.dtype).eps * squared.detach().mean(dim=(-2, -1), keepdim=True)
    coincide = squared <= floor
    return squared.masked_fill(coincide, 1.0).sqrt().masked_fill(coincide, 0.0)


def _relative_distances(tokens: torch.Tensor) -> torch.Tensor:
    """Distances `(B, N, N)` over their mean off the diagonal; all zero where all tokens coincide."""
    num_tokens = tokens.shape[1]
    pairs = _distances(tokens)
    mean = pairs.sum(dim=(1, 2), keepdim=True) / (num_tokens * (num_tokens - 1))
    return pairs / torch.where(mean > 0, mean, torch.ones_like(mean))


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
