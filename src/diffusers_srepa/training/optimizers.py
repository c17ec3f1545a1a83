"""Optimisers, the learning rate as a function of the step, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn
from torch.distributed.tensor import DTensor

from diffusers_srepa.configuration.sections import OptimizerConfig
from diffusers_srepa.errors import ConfigurationError, close_matches
from diffusers_srepa.training.distributed import shard_like


logger = get_logger(__name__)


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameters`, in its fused form where every parameter's device has one."""
    parameters = list(parameters)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    fused = all(parameter.device.type in ("cuda", "xpu") for parameter in parameters)
    return torch.optim.AdamW(parameters, fused=fused, weight_decay=config.weight_decay, **options)


def learning_rate(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """The learning rate of a step as a function of the steps made before it: a schedule of diffusers.

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
    # diffusers hands its functions out only as part of a scheduler, which needs some optimiser.
    some_optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(
        config.lr_schedule, some_optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max_steps
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: config.lr * factor(step)


class EMA:
    """Exponential moving average of the trained parameters, with one decay from the first step on.

    Args:
        modules (`Mapping[str, nn.Module]`): the unwrapped trained modules by name, sharded or not.
        decay (`float`): weight of the old average in each update.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.parameters = named_parameters(modules)
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights; call once after each step.

        The average of a parameter that was frozen in the course of the run stays as it is.
        """
        moving = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        averages = [_local(self.averages[name]) for name in moving]
        torch._foreach_lerp_(averages, [_local(self.parameters[name]) for name in moving], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the modules, which must not be sharded, have the averaged weights, afterwards their own.

        Nothing is copied: weights and averages change places.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def of_module(self, module: str) -> dict[str, torch.Tensor]:
        """The averaged parameters of one module by their names in it."""
        prefix = f"{module}."
        return {name.removeprefix(prefix): value for name, value in self.averages.items() if name.startswith(prefix)}

    def load(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Put saved averages back, whole tensors by `<module>.<parameter>`.

        Raises:
            ValueError: the names are not those of the trained parameters.
        """
        missing, unknown = self.averages.keys() - averages.keys(), averages.keys() - self.averages.keys()
        if missing or unknown:
            raise ValueError(
                f"the saved average is another model's: {len(missing)} weights are missing (first: "
                f"{sorted(missing)[:1]}), {len(unknown)} are unknown (first: {sorted(unknown)[:1]})."
            )
        for name, average in self.averages.items():
            average.copy_(shard_like(averages[name], average))

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """All parameters by `<module>.<parameter>`."""
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.named_parameters()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    # An average is element by element, so each process can do it on its own shard.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def warn_if_average_is_young(decay: float, max_steps: int) -> None:
    """Warn when the final average still holds more than a tenth of the initial weights."""
    share = decay**max_steps
    if share > 0.1:
        suggestion = math.exp(math.log(0.01) / max_steps)
        logger.warning(
            f"after {max_steps} steps an average with decay {decay} still holds {share:.0%} of the initial weights, "
            f"so its samples will be noise: lower training.ema_decay (to about {suggestion:.3f}) or train longer."
        )
