"""One optimiser step: the phases of a method in order, each over all micro-batches of the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffusers_srepa.configuration.sections import OptimizerConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.distributed import reshard, wrap_module
from diffusers_srepa.training.method import LossOutput, Phase, StepContext, TrainingMethod
from diffusers_srepa.training.nonfinite import poison_unless_finite
from diffusers_srepa.training.optimizers import EMA, build_optimizer, learning_rate


class PhaseOptimizer:
    """A phase with its optimiser and learning rate.

    Args:
        phase (`Phase`): the phase.
        modules (`Mapping[str, nn.Module]`): the method's modules, on the device and sharded if they will be.
        accelerator (`Accelerator`): the run's.
        options (`OptimizerConfig`): the run's options, for a phase without its own.
        max_steps (`int`): steps of the run, for schedules.
    """

    def __init__(
        self,
        phase: Phase,
        modules: Mapping[str, nn.Module],
        accelerator: Accelerator,
        options: OptimizerConfig,
        max_steps: int,
    ) -> None:
        self.name = phase.name
        self.options = phase.optimizer or options
        self.learning_rate = learning_rate(self.options, max_steps)
        self.parameters = [parameter for name in phase.modules for parameter in modules[name].parameters()]
        self.optimizer: AcceleratedOptimizer = accelerator.prepare_optimizer(
            build_optimizer(self.parameters, self.options)
        )

    def is_active(self) -> bool:
        """Whether anything is left to train."""
        return any(parameter.requires_grad for parameter in self.parameters)

    def step(self, accelerator: Accelerator, step: int) -> tuple[torch.Tensor, bool]:
        """Update the parameters unless the gradient is not finite.

        Args:
            accelerator (`Accelerator`): the run's.
            step (`int`): optimiser steps made before this one.

        Returns:
            The gradient's norm before clipping, equal on all processes, and whether it is finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        accelerator.unscale_gradients()
        limit = self.options.max_grad_norm or float("inf")
        norm: Any = nn.utils.clip_grad_norm_(self.parameters, limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_finite = bool(torch.isfinite(norm))
        # The scaler of fp16 skips by itself, and has to know of it to lower its scale.
        if is_finite or accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach(), is_finite


class TrainingStep:
    """The trained modules as the run wraps them, and the step that updates them.

    Args:
        method (`TrainingMethod`): prepared.
        accelerator (`Accelerator`): the run's.
        options (`OptimizerConfig`): the options of the section `optimizer`.
        max_steps (`int`): steps of the run.
        ema_decay (`float`): decay of the moving average.
        num_micro_batches (`int`): micro-batches of this process per step.
        sharded (`bool`): whether FSDP2 shards the modules.
    """

    def __init__(
        self,
        method: TrainingMethod,
        accelerator: Accelerator,
        *,
        options: OptimizerConfig,
        max_steps: int,
        ema_decay: float,
        num_micro_batches: int,
        sharded: bool,
    ) -> None:
        self.method = method
        self.accelerator = accelerator
        self.num_micro_batches = num_micro_batches
        self.loss_names: set[str] = set()
        self.wrapped = {
            name: wrap_module(accelerator, module.to(accelerator.device), sharded)
            for name, module in method.modules.items()
        }
        self.sharded = sharded
        # Sharding replaces the parameters, so optimisers and average come after it.
        self.optimizers = {
            phase.name: PhaseOptimizer(phase, method.modules, accelerator, options, max_steps)
            for phase in method.phases
        }
        self.ema = EMA(method.modules, ema_decay)

    def plain_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimisers of torch by phase."""
        return {name: phase.optimizer.optimizer for name, phase in self.optimizers.items()}

    def current_learning_rate(self, step: int) -> dict[str, float]:
        """The learning rates after `step` steps: `lr` of the last phase, and those of the others by their names."""
        rates = {name: phase.learning_rate(step) for name, phase in self.optimizers.items()}
        last = list(rates)[-1]
        return {"lr": rates.pop(last), **{f"lr/{name}": rate for name, rate in rates.items()}}

    def train_mode(self) -> None:
        """Put the modules into training mode."""
        for module in self.wrapped.values():
            module.train()

    def rewrap(self, names: set[str]) -> None:
        """Wrap modules anew in which parameters have been frozen.

        DDP would wait for their gradients for ever. FSDP reduces the gradients that are there and needs nothing.
        """
        for name in names:
            if isinstance(self.wrapped[name], DistributedDataParallel):
                module = self.accelerator.unwrap_model(self.wrapped[name], keep_fp32_wrapper=False)
                self.accelerator._models.remove(module)
                self.wrapped[name] = self.accelerator.prepare_model(module)

    def unwrap(self) -> None:
        """Let go of the wrappers.

        With gloo, a DDP module that is alive when the process group goes can wait for ever for a peer that has left.
        """
        self.wrapped = dict(self.method.modules)

    def run(
        self, batches: Iterator[dict[str, torch.Tensor]], step: int
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, float]]:
        """One optimiser step.

        A phase whose gradient is not finite updates nothing, and neither do the phases after it nor the average.

        Args:
            batches (`Iterator`): this process's micro-batches, on the device.
            step (`int`): optimiser steps made before this one.

        Returns:
            The means of the raw values over this process's micro-batches with the gradients' norms before clipping,
            or None if the step was skipped; and the weights of the losses.
        """
        # A method may have frozen all that a phase trains, for good.
        phases = [phase for phase in self.method.phases if self.optimizers[phase.name].is_active()]
        # Several phases read the batches several times; one alone takes them as they come.
        share = (next(batches) for _ in range(self.num_micro_batches))
        held = list(share) if len(phases) > 1 else []
        values: dict[str, torch.Tensor] = {}
        weights: dict[str, float] = {}
        is_finite = True
        for phase in phases:
            sums, phase_weights = self._accumulate(phase, held or share, step)
            norm, is_finite = self.optimizers[phase.name].step(self.accelerator, step)
            name = "" if len(self.method.phases) == 1 else f"/{phase.name}"
            loss = {f"loss{name}": sums.pop("loss")}
            self.loss_names |= {"loss", *loss, *sums}
            values |= {**loss, **sums, f"grad_norm{name}": norm}
            weights |= phase_weights
            if not is_finite:
                break
        if is_finite:
            self.ema.update()
        if len(phases) > 1 and is_finite:
            values["loss"] = torch.stack([values[f"loss/{phase.name}"] for phase in phases]).sum()
        return (values if is_finite else None), weights

    def _accumulate(
        self, phase: Phase, batches: Iterable[dict[str, torch.Tensor]], step: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The gradients of a phase over all micro-batches, and the means of its values."""
        sums: dict[str, torch.Tensor] = {}
        output = LossOutput(torch.zeros(()))
        with self._context(phase, step) as context:
            for index, batch in enumerate(batches):
                # Gradients travel between processes once per step, with the last micro-batch.
                with ExitStack() as stack:
                    if index < self.num_micro_batches - 1:
                        for name in phase.modules:
                            stack.enter_context(self.accelerator.no_sync(self.wrapped[name]))
                    output = phase.loss(batch, context)
                    self.accelerator.backward(poison_unless_finite(output.loss) / self.num_micro_batches)
                for name, value in {"loss": output.loss.detach(), **output.parts}.items():
                    sums[name] = sums.get(name, 0.0) + value / self.num_micro_batches
        return sums, output.weights

    @contextmanager
    def _context(self, phase: Phase, step: int) -> Iterator[StepContext]:
        """What the losses of a phase get; meanwhile the modules of other phases are frozen."""
        # Outside its own phase a module is called without its wrapper, whose gradients nobody would wait for.
        modules = {
            name: self.wrapped[name] if name in phase.modules else module
            for name, module in self.method.modules.items()
        }
        others = [
            parameter
            for name, module in self.method.modules.items()
            if name not in phase.modules
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        self._freeze(others, True)
        try:
            yield StepContext(step, modules, self._average_of, self.accelerator.autocast)
        finally:
            self._freeze(others, False)

    def _freeze(self, parameters: Sequence[nn.Parameter], frozen: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad_(not frozen)
        if self.sharded and parameters:
            # What FSDP2 has gathered for another phase keeps that phase's weights, and whether they are trained.
            for module in self.method.modules.values():
                reshard(module)

    def _average_of(self, module: str) -> dict[str, torch.Tensor]:
        if self.sharded:
            raise ConfigurationError(
                "the method runs averaged weights forward, which FSDP2 has shared out: launch without --use_fsdp."
            )
        return self.ema.of_module(module)
