"""VA-VAE's distance-matrix loss with a margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.objectives.base import AlignmentObjective, check_number
from diffusers_srepa.alignment.structural.reference import cosine_gram


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

    def compute(self, student: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """`(B, N, D_S)` and `(B, N, D_T)` to `(B,)`."""
        assert target is not None
        difference = cosine_gram(student) - cosine_gram(target)
        return F.relu(difference.abs() - self.margin).mean(dim=(1, 2))
