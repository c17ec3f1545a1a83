"""Point-wise alignment by cosine similarity: REPA's objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.structural.normalize import normalize_tokens


@dataclass(frozen=True)
class CosineAlignment(AlignmentObjective):
    """Mean over all tokens of `-cos(student_i, target_i)`, per sample; in [-1, 1].

    REPA (Yu et al., arXiv 2410.06940) and Eq. 4 of sREPA, which writes `1 - cos`: same gradient. Prefix tokens take
    part, as in REG. A token with norm below 1e-6 counts as zero: it contributes 0 and gets zero gradient.
    """

    needs_equal_width: ClassVar[bool] = True

    def compute(self, student: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """`(B, N, D)` and `(B, N, D)` to `(B,)`."""
        assert target is not None
        return -(normalize_tokens(student) * normalize_tokens(target)).sum(dim=-1).mean(dim=-1)
