"""Dispersive loss: representations of different images pushed apart, with no teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffusers_srepa.alignment.objectives.base import AlignmentObjective, check_number
from diffusers_srepa.alignment.objectives.distances import squared_distances
from diffusers_srepa.alignment.objectives.gather import gather_samples


@dataclass(frozen=True)
class DispersiveAlignment(AlignmentObjective):
    """`log mean_ij exp(-|z_i - z_j|^2 / (K tau))` over all ordered pairs of samples, a scalar <= 0.

    The InfoNCE loss with l2 distance of Wang and He, arXiv 2506.09027, as their released code computes it: z are the
    flattened tokens of a sample, K numbers each, and the mean runs over B^2 pairs, a sample with itself included. B
    counts the samples of all processes. Meant for the hidden tokens themselves: `projector=None`, no target.

    Args:
        tau (`float`): temperature, > 0; the released code has 1.
        include_prefix_tokens (`bool`): whether class and register tokens take part.

    Raises:
        ConfigurationError: `tau` is not positive or no number.
    """

    scope: ClassVar[Literal["sample", "batch"]] = "batch"
    needs_target: ClassVar[bool] = False

    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "tau", 0.0, open_end=True)

    def compute(self, student: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """`(B, N, D)` to `()`."""
        samples = gather_samples(student, type(self).__name__).flatten(1)
        logits = -squared_distances(samples) / (samples.shape[1] * self.tau)
        return logits.flatten().logsumexp(dim=0) - math.log(logits.numel())
