"""Samples of all processes, for objectives that compare samples with one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


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
        local (`torch.Tensor`): shape `(B, ...)`, the same on every process.
        name (`str`): who asks, for the error.

    Returns:
        `torch.Tensor`: shape `(processes * B, ...)`.

    Raises:
        ValueError: there is only one sample in all.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        local = _GatherSamples.apply(local.contiguous())
    if len(local) < 2:
        raise ValueError(
            f"{name} compares the samples of a batch with one another and needs at least 2, but got {len(local)}: use "
            "a larger batch per step."
        )
    return local
