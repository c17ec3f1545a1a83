"""Did the launcher start what the user asked for? Several ways of starting several processes silently start one."""

from __future__ import annotations

import os
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType

from diffusers_srepa.data.order import BatchLayout
from diffusers_srepa.errors import ConfigurationError, in_options
from diffusers_srepa.training.config_sections import LoopConfig


def check_environment(environment: Mapping[str, str] | None = None) -> None:
    """Refuse a half-set distributed environment, before `Accelerator` takes it for a single process.

    Raises:
        ConfigurationError: `MASTER_ADDR` is set without `WORLD_SIZE`, as by
            `accelerate launch --cpu --num_processes 2`.
    """
    environment = os.environ if environment is None else environment
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise ConfigurationError(
            "the launcher set MASTER_ADDR but not WORLD_SIZE, so this would be one process however many were asked "
            "for: for several processes on CPU, use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes N."
        )


def check_processes(accelerator: Accelerator, expected_processes: int | None) -> None:
    """Refuse a number or kind of processes other than what was asked for.

    Raises:
        ConfigurationError: the number differs from `expected_processes`, or DeepSpeed was asked for.
    """
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
    with in_options({name: f"training.{name}" for name in ("global_batch_size", "micro_batch_size")}):
        return BatchLayout(loop.global_batch_size, size, num_processes=num_processes).micro_batch_size
