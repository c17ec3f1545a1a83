"""Similarity-preserving distillation across the samples of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.objectives.gather import gather_samples
from diffusers_srepa.alignment.structural.normalize import normalize_tokens


@dataclass(frozen=True)
class SimilarityPreservingAlignment(AlignmentObjective):
    """`|G_T - G_S|^2 / B^2`, where G holds the inner products of flattened samples, each row scaled to length 1.

    Tung and Mori, arXiv 1907.09682 (Eq. 1-4): images that the teacher finds alike should look alike to the student. A
    scalar over the samples of all processes, B in all. Widths may differ.

    Args:
        include_prefix_tokens (`bool`): whether class and register tokens take part.
    """

    scope: ClassVar[Literal["sample", "batch"]] = "batch"

    def compute(self, student: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """`(B, N, D_S)` and `(B, N, D_T)` to `()`."""
        assert target is not None
        name = type(self).__name__
        difference = _row_similarities(gather_samples(student, name)) - _row_similarities(gather_samples(target, name))
        return difference.square().mean()


def _row_similarities(tokens: torch.Tensor) -> torch.Tensor:
    samples = tokens.flatten(1)
    return normalize_tokens(samples @ samples.mT)
