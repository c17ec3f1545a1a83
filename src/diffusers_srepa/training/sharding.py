"""FSDP2: every process holds a part of each weight, of its average and of its optimiser state.

Checkpoints and pipelines hold whole tensors whatever the number of processes, so that any other number can read them.
Gathering is collective: every process has to take part, the main process alone keeps the result.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusers_srepa.errors import ConfigurationError


def sharding_is_wanted(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the launcher was asked for FSDP."""
    environment = os.environ if environment is None else environment
    return environment.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def prepare_sharding(accelerator: Accelerator, block_names: list[str]) -> bool:
    """Set up FSDP2 if the launcher asks for it; to be called before `accelerator.prepare`.

    Args:
        accelerator (`Accelerator`): the run's.
        block_names (`list[str]`): classes of the transformer's blocks, each of which becomes a unit of its own.

    Returns:
        `bool`: whether weights will be sharded.

    Raises:
        ConfigurationError: FSDP 1, its own activation checkpointing, or a single process.
    """
    if not sharding_is_wanted():
        return False
    if accelerator.num_processes < 2:
        raise ConfigurationError(
            "FSDP was asked for, but there is one process, which has nothing to shard: launch with --num_processes 2 "
            "or more, or without --use_fsdp."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigurationError(
            f"FSDP version {plugin.fsdp_version} was asked for, but only version 2 is supported: launch with "
            "--fsdp_version 2."
        )
    if plugin.activation_checkpointing:
        raise ConfigurationError(
            "FSDP's activation checkpointing would hide the tapped blocks: leave it out of the launcher's options and "
            "set --model.gradient_checkpointing."
        )
    # Autocast chooses precisions, as without sharding: FSDP's own casting would also round timesteps to bfloat16.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    plugin.cpu_ram_efficient_loading = False
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = list(block_names)
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate takes FSDP for an accelerator's affair and would run DDP here without a word; gloo can do it.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return True


def weightless_copy(module: nn.Module) -> Any:
    """A deep copy whose parameters and buffers have shapes but no memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(module, memo)


def gather(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors of sharded ones, on the CPU; every process must call, with the same names in the same order.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): sharded and plain tensors; a plain one is taken as it is.
        keep (`bool`): whether this process wants the result; the others get an empty dict.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().cpu() if isinstance(tensor, DTensor) else full
    return whole


def shard_like(whole: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that every process has whole, sharded as `reference` is."""
    if not isinstance(reference, DTensor) or whole.shape != reference.shape:
        return whole
    placed = whole.to(device=reference.device, dtype=reference.dtype)
    return distribute_tensor(placed, reference.device_mesh, reference.placements, src_data_rank=None)
