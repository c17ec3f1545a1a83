"""Objectives that compare Euclidean distances between the tokens of each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.objectives.base import AlignmentObjective


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
