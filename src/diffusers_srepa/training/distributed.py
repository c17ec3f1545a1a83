"""Processes and precision of a run: the launcher's word, the `Accelerator`, and FSDP2.

Under FSDP2 every process holds a part of each weight, of its average and of its optimiser state. Checkpoints and
pipelines hold whole tensors whatever the number of processes, so that any other number can read them. Gathering is
collective: every process has to take part, the main process alone keeps the result.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusers_srepa.configuration.sections import LoopConfig
from diffusers_srepa.configuration.training import RunConfig
from diffusers_srepa.data.order import BatchLayout
from diffusers_srepa.errors import ConfigurationError


# The other processes wait while one downloads a dataset, samples validation images or writes a checkpoint. A process
# that dies does not need this limit to be noticed: the launcher ends the others.
LONGEST_WAIT = timedelta(hours=3)
DEFAULT_PRECISION = "bf16"


def resolve_precision(option: str | None, environment: Mapping[str, str] | None = None) -> str:
    """The precision of a run: the option, else what `accelerate launch` was asked for, else bf16.

    The launcher says "no" also when it was asked for nothing, so its "no" counts as nothing.

    Raises:
        ConfigurationError: option and launcher contradict each other, or the launcher was asked for what there is not.
    """
    environment = os.environ if environment is None else environment
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched in ("no", ""):
        return option or DEFAULT_PRECISION
    if launched not in ("bf16", "fp16"):
        raise ConfigurationError(
            f"the launcher was asked for the precision {launched}, but training knows bf16, fp16 and no: change the "
            "launcher's --mixed_precision."
        )
    if option is not None and option != launched:
        raise ConfigurationError(
            f"training.mixed_precision is {option}, but the launcher was asked for {launched}: set one of them, or "
            "both alike."
        )
    return launched


def build_accelerator(config: RunConfig, log_with: str | None) -> Accelerator:
    """The accelerator that a configuration with resolved precision and the launcher describe.

    Args:
        config (`RunConfig`): the run's.
        log_with (`str`, *optional*): the trackers.

    Raises:
        ConfigurationError: fp16 on the CPU, or a launcher that did not start what was asked for.
    """
    _check_environment(os.environ)
    output_dir = Path(str(config.output_dir))
    precision = str(config.training.mixed_precision)
    # Accelerate keeps the precision of the first run in a process for all later ones.
    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=log_with,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    if accelerator.device.type == "cpu" and precision == "fp16":
        raise ConfigurationError(
            "training.mixed_precision is fp16, which needs an accelerator: set it to bf16 or no on the CPU."
        )
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
        torch.backends.cudnn.allow_tf32 = config.training.allow_tf32
    _check_processes(accelerator, config.expected_processes)
    return accelerator


def _check_environment(environment: Mapping[str, str]) -> None:
    """Refuse a half-set distributed environment, before `Accelerator` takes it for a single process."""
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise ConfigurationError(
            "the launcher set MASTER_ADDR but not WORLD_SIZE, so this would be one process however many were asked "
            "for: for several processes on CPU, use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes N."
        )


def _check_processes(accelerator: Accelerator, expected_processes: int | None) -> None:
    if expected_processes is not None and accelerator.num_processes != expected_processes:
        raise ConfigurationError(
            f"{accelerator.num_processes} processes are running, but expected_processes is {expected_processes}: "
            "change the launcher's --num_processes or --expected_processes."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigurationError(
            "DeepSpeed was asked for, whose engine keeps optimiser state that checkpoints here do not hold: launch "
            "with --use_fsdp --fsdp_version 2 to shard, or with --multi_gpu."
        )


def micro_batch_size(loop: LoopConfig, num_processes: int) -> int:
    """Images per forward pass and process, checked against the global batch.

    Raises:
        ConfigurationError: the global batch cannot be divided among processes and micro-batches.
    """
    if loop.global_batch_size % num_processes:
        raise ConfigurationError(
            f"a global batch of {loop.global_batch_size} cannot be divided among {num_processes} processes: "
            "change training.global_batch_size or the number of processes."
        )
    size = loop.micro_batch_size or loop.global_batch_size // num_processes
    return BatchLayout(loop.global_batch_size, size, num_processes=num_processes).micro_batch_size


def prepare_sharding(accelerator: Accelerator, environment: Mapping[str, str] | None = None) -> bool:
    """Set up FSDP2 if the launcher asks for it; to be called before `wrap_module`.

    Returns:
        `bool`: whether weights will be sharded.

    Raises:
        ConfigurationError: FSDP 1, its own activation checkpointing, or a single process.
    """
    environment = os.environ if environment is None else environment
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true"):
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
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate takes FSDP for an accelerator's affair and would run DDP here without a word; gloo can do it.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return True


def wrap_module(accelerator: Accelerator, module: nn.Module, sharded: bool) -> nn.Module:
    """A trained module as the processes share it: sharded by FSDP2 in place, else within DDP, or alone."""
    if not sharded:
        return accelerator.prepare_model(module)
    plugin = accelerator.state.fsdp_plugin
    # Each of the transformer's blocks becomes a unit of its own; `Accelerator.prepare` takes one module only.
    blocks = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(blocks)
    wrapped = fsdp2_prepare_model(accelerator, module)
    accelerator._models.append(wrapped)
    return wrapped


def reshard(module: nn.Module) -> None:
    """Let go of the whole weights that FSDP2 has gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def weightless_copy(module: nn.Module) -> Any:
    """A deep copy whose parameters have shapes but no memory; buffers, which are not sharded, stay what they are."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
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
