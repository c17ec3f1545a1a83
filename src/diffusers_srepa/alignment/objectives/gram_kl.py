"""Structural alignment by matching neighbour distributions: sREPA-KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffusers_srepa.alignment.objectives.base import AlignmentObjective, check_number
from diffusers_srepa.alignment.structural.exact import (
    KL_FORMS,
    KL_REDUCTIONS,
    check_choice,
    gram_kl_loss,
)


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

    def compute(self, student: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """`(B, N, D_S)` and `(B, N, D_T)` to `(B,)`."""
        assert target is not None
        return gram_kl_loss(student, target, self.tau_teacher, self.tau_student, self.reduction, self.form)
