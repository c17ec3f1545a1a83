"""Euclidean distances between all pairs of rows."""

from __future__ import annotations

import torch


def squared_distances(rows: torch.Tensor) -> torch.Tensor:
    """`|x_i - x_j|^2` of all pairs, through inner products; the diagonal is exactly 0, nothing is negative.

    Args:
        rows (`torch.Tensor`): shape `(..., N, D)`.

    Returns:
        `torch.Tensor`: shape `(..., N, N)`.
    """
    # Distances do not depend on the origin; near the mean the inner products lose the fewest digits.
    centred = rows - rows.mean(dim=-2, keepdim=True).detach()
    products = centred @ centred.mT
    norms = products.diagonal(dim1=-2, dim2=-1)
    distances = norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * products
    diagonal = torch.eye(rows.shape[-2], dtype=torch.bool, device=rows.device)
    return distances.masked_fill(diagonal, 0.0).clamp(min=0)


def distances(rows: torch.Tensor) -> torch.Tensor:
    """`|x_i - x_j|` of all pairs `(..., N, N)`; coinciding rows have distance 0 and give each other no gradient."""
    squared = squared_distances(rows)
    # Below this, a squared distance is the rounding error of the inner products.
    floor = torch.finfo(rows.dtype).eps * squared.detach().mean(dim=(-2, -1), keepdim=True)
    coincide = squared <= floor
    return squared.masked_fill(coincide, 1.0).sqrt().masked_fill(coincide, 0.0)
