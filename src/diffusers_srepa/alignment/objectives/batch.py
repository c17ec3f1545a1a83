"""Objectives that compare the images of a batch, those of all processes, with one another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import distributed

from diffusers_srepa.alignment.gram.normalize import normalize_tokens
from diffusers_srepa.alignment.objectives.base import AlignmentObjective, check_number
from diffusers_srepa.alignment.objectives.relational import linear_cka, squared_distances


@dataclass(frozen=True)
class BatchCKAAlignment(AlignmentObjective):
    """`1 - CKA` of whole samples, their tokens flattened into one row each; a scalar in [0, 1].

    As `CKAAlignment`, with the images of the batch, those of all processes, as the rows.
    """

    scope: ClassVar[Literal["sample", "batch"]] = "batch"

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        name = type(self).__name__
        student_rows = gather_samples(student, name).flatten(1)
        return 1.0 - linear_cka(student_rows, gather_samples(target, name).flatten(1))


@dataclass(frozen=True)
class SimilarityPreservingAlignment(AlignmentObjective):
    """`|G_T - G_S|^2 / B^2`, where G holds the inner products of flattened samples, each row scaled to length 1.

    Tung and Mori, arXiv 1907.09682 (Eq. 1-4): images that the teacher finds alike should look alike to the student. A
    scalar over the samples of all processes, B in all. Widths may differ.
    """

    scope: ClassVar[Literal["sample", "batch"]] = "batch"

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        name = type(self).__name__
        samples = [gather_samples(tokens, name).flatten(1) for tokens in (student, target)]
        student_rows, target_rows = [normalize_tokens(rows @ rows.mT) for rows in samples]
        return (student_rows - target_rows).square().mean()


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

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        samples = gather_samples(student, type(self).__name__).flatten(1)
        logits = -squared_distances(samples) / (samples.shape[1] * self.tau)
        return logits.flatten().logsumexp(dim=0) - math.log(logits.numel())


class _GatherSamples(torch.autograd.Function):
    """All-gather whose backward pass sums over processes what each of them wants of this process's samples."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        ctx.num_local = len(local)
        parts = [torch.empty_like(local) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        start = distributed.get_rank() * ctx.num_local
        return gradient[start : start + ctx.num_local]


def gather_samples(local: torch.Tensor, name: str) -> torch.Tensor:
    """The samples of all processes in order of rank, with gradient; without a process group, the samples as they are.

    Every process then computes the same loss. Its gradient arrives at a sample once per process, which the averaging
    of gradients over processes (DDP) undoes: the result is the gradient of the loss over the whole batch.

    Args:
        local (`torch.Tensor`): shape `(B, ...)`, the same on every process; the result has `(processes * B, ...)`.
        name (`str`): who asks, for the error where there is only one sample in all.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        local = _GatherSamples.apply(local.contiguous())
    if len(local) < 2:
        raise ValueError(
            f"{name} compares the samples of a batch with one another and needs at least 2, but got {len(local)}: use "
            "a larger batch per step."
        )
    return local
