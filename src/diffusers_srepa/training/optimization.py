"""Optimiser and learning-rate schedule of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from diffusers_srepa.configuration.sections import OptimizerConfig
from diffusers_srepa.errors import ConfigurationError, close_matches


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameters`, in its fused form where every parameter's device has one."""
    parameters = list(parameters)
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    fused = all(parameter.device.type in ("cuda", "xpu") for parameter in parameters)
    return torch.optim.AdamW(parameters, fused=fused, **options)


def set_schedule_step(schedule: LambdaLR, step: int) -> None:
    """Put a fresh schedule where it is after `step` optimiser steps; it is a function of the step alone."""
    schedule.last_epoch = step
    schedule._step_count = step + 1
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def build_lr_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, max_steps: int) -> LambdaLR:
    """A schedule of diffusers, counted in optimiser steps whatever the number of processes.

    Raises:
        ConfigurationError: no schedule that can be used has that name.
    """
    # Piecewise schedules need rules of their own, for which there is no option.
    names = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    if config.lr_schedule not in names:
        raise ConfigurationError(
            f"there is no schedule {config.lr_schedule!r}, {close_matches(config.lr_schedule, names)} "
            "(option optimizer.lr_schedule)."
        )
    return get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max_steps
    )
