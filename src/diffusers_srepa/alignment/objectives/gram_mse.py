"""Structural alignment by regression of similarities: sREPA-MSE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.structural.exact import MSE_FORMS, check_choice, gram_mse_loss


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

    def compute(self, student: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """`(B, N, D_S)` and `(B, N, D_T)` to `(B,)`."""
        assert target is not None
        return gram_mse_loss(student, target, form=self.form)
