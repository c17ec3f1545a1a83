"""All tensors of a run at one step, whole, ready to be written: trained weights, their average, the optimiser."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.training.ema import WeightAverage
from diffusers_srepa.training.sharding import gather, shard_like


@dataclass
class Snapshot:
    """What a checkpoint holds.

    Args:
        student: The trained module; for a sharded run a whole copy on the CPU.
        average: Averaged weights by parameter name.
        optimizer: The optimiser's tensors as `<parameter name>/<key>`.
        groups: The names of the optimiser's parameters by group.
    """

    student: AlignedDenoiser
    average: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    groups: dict[str, Any]


def take_snapshot(
    student: AlignedDenoiser,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    template: AlignedDenoiser | None = None,
    keep: bool = True,
) -> Snapshot | None:
    """Gather what a checkpoint holds; with sharded weights every process must call.

    Args:
        student (`AlignedDenoiser`): the unwrapped trained module.
        average (`WeightAverage`): its moving average.
        optimizer (`torch.optim.Optimizer`): the plain optimiser over the student's parameters.
        template (`AlignedDenoiser`, *optional*): copy without memory of a sharded student; None if nothing is sharded.
        keep (`bool`): whether this process wants the snapshot; the others get None.
    """
    tensors, groups = optimizer_state(optimizer, student)
    averaged, moments = gather(average.state(), keep), gather(tensors, keep)
    if template is None:
        return Snapshot(student, averaged, moments, groups) if keep else None
    weights = gather(student.state_dict(), keep)
    return Snapshot(rebuild(template, weights), averaged, moments, groups) if keep else None


def rebuild(template: AlignedDenoiser, weights: Mapping[str, torch.Tensor]) -> AlignedDenoiser:
    """A module like `template`, a copy without memory, that has these weights."""
    whole = copy.deepcopy(template)
    whole.load_state_dict(dict(weights), assign=True)
    return whole.eval()


def optimizer_state(
    optimizer: torch.optim.Optimizer, student: torch.nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimiser's tensors as `<parameter name>/<key>`, and the names of its parameters by group."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            tensors[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    return tensors, {"parameters": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    student: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
) -> None:
    """The inverse of `optimizer_state`.

    Raises:
        ValueError: a saved parameter is unknown, or the groups hold other parameters.
    """
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    present = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if present != settings["parameters"]:
        raise ValueError("the saved optimiser has other parameters than this run trains.")
    parameters = dict(student.named_parameters())
    order = {name: index for index, name in enumerate(name for group in present for name in group)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(order[name], {})[key] = shard_like(tensor, parameters[name])
    # Learning rate, betas and the like are this run's: the configuration says them, and a resume compares it.
    groups = [
        {**group, "params": [order[name] for name in names_of_group]}
        for group, names_of_group in zip(optimizer.param_groups, present, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
