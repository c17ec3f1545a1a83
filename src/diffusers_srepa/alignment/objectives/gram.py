"""Objectives that compare the token-to-token cosine similarities of each image: sREPA's two and their relatives."""

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
)
from diffusers_srepa.alignment.gram.reference import cosine_gram
from diffusers_srepa.alignment.objectives.base import AlignmentObjective, check_number


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
