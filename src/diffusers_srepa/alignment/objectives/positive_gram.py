"""DINOv3's Gram loss, which takes negative similarities for zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.structural.exact import check_choice
from diffusers_srepa.alignment.structural.reference import cosine_gram


@dataclass(frozen=True)
class PositiveGramAlignment(AlignmentObjective):
    """Mean over all N^2 pairs of the squared difference of cosine similarities, negative ones removed, per sample.

    The Gram anchoring of DINOv3 (Siméoni et al., arXiv 2508.10104) in the two variants of its released code. Unlike
    `GramMSEAlignment` the mean includes the diagonal, so that it is `(N - 1) / N` of the off-diagonal mean. Widths may
    differ.

    Args:
        remove (`str`): `"both"` sets negative similarities of either side to zero. `"teacher"` sets the teacher's to
            zero, and the student's where both are negative: a student that is negative where the teacher is positive
            still feels how far off it is.
        include_prefix_tokens (`bool`): whether class and register tokens take part.

    Raises:
        ValueError: `remove` is unknown.
    """

    min_tokens: ClassVar[int] = 2

    remove: str = "both"

    def __post_init__(self) -> None:
        check_choice("remove", self.remove, ("both", "teacher"))

    def compute(self, student: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """`(B, N, D_S)` and `(B, N, D_T)` to `(B,)`."""
        assert target is not None
        student_gram, target_gram = cosine_gram(student), cosine_gram(target)
        removed = student_gram < 0
        if self.remove == "teacher":
            removed = removed & (target_gram < 0)
        difference = student_gram.masked_fill(removed, 0.0) - target_gram.clamp(min=0)
        return difference.square().mean(dim=(1, 2))
