"""The losses of a run, called or changed from outside."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffusers_srepa.training.method import LossOutput, StepContext
from diffusers_srepa.training.trainer import Trainer


def change_losses(trainer: Trainer, change: Callable[[LossOutput, int], LossOutput]) -> None:
    """Let `change(output, step)` see and replace the output of every loss of the trainer's method."""

    def changed(loss: Any) -> Any:
        return lambda batch, context: change(loss(batch, context), context.step)

    phases = trainer.method.phases
    trainer.method.phases = tuple(replace(phase, loss=changed(phase.loss)) for phase in phases)


def before_step(trainer: Trainer, chosen: int, action: Callable[[], Any]) -> None:
    """Call `action` in the step that follows `chosen` steps."""

    def act(output: LossOutput, step: int) -> LossOutput:
        if step == chosen:
            action()
        return output

    change_losses(trainer, act)


def plain_context(trainer: Trainer, step: int = 0) -> StepContext:
    """What a loss gets at `step` of a run in one process."""
    modules, autocast = trainer.training.wrapped, trainer.accelerator.autocast
    return StepContext(step, modules, trainer.ema.of_module, autocast)
