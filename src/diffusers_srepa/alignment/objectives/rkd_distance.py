"""Relational knowledge distillation by distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.objectives.distances import distances


@dataclass(frozen=True)
class RKDDistanceAlignment(AlignmentObjective):
    """Huber loss between the relative token distances of student and target, mean over `i != j`, per sample.

    RKD-D (Park et al., arXiv 1904.05068) with the tokens of an image in place of the images of a batch: a distance
    `|x_i - x_j|` is divided by the mean distance of all pairs, so the scale of the features does not matter. Widths
    may differ.

    Args:
        include_prefix_tokens (`bool`): whether class and register tokens take part.
    """

    min_tokens: ClassVar[int] = 2

    def compute(self, student: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """`(B, N, D_S)` and `(B, N, D_T)` to `(B,)`."""
        assert target is not None
        num_tokens = student.shape[1]
        # Distances of a token to itself are equal, 0, and add nothing to the sum.
        penalty = F.huber_loss(_relative_distances(student), _relative_distances(target), reduction="none")
        return penalty.sum(dim=(1, 2)) / (num_tokens * (num_tokens - 1))


def _relative_distances(tokens: torch.Tensor) -> torch.Tensor:
    """Distances `(B, N, N)` over their mean off the diagonal; all zero where all tokens coincide."""
    num_tokens = tokens.shape[1]
    pairs = distances(tokens)
    mean = pairs.sum(dim=(1, 2), keepdim=True) / (num_tokens * (num_tokens - 1))
    return pairs / torch.where(mean > 0, mean, torch.ones_like(mean))
