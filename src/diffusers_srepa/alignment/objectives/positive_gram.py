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

    def compute(self, student: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """`(B, N, D_S)` and `(B, N, D_T)` to `(B,)`."""
        assert target is not None
        student_gram, target_gram = cosine_gram(student), cosine_gram(target)
        if self.remove == "both":
            student_gram = student_gram.masked_fill(student_gram < 0, 0.0)
        return (student_gram - target_gram.clamp(min=0)).square().mean(dim=(1, 2))
