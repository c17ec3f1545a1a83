"""What a run tells while it goes: the announcement, logged values, the progress bar."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm import tqdm

from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.training.components import Components
from diffusers_srepa.training.ema import warn_if_average_is_young
from diffusers_srepa.training.meter import Meter
from diffusers_srepa.training.tracking import RunLog


logger = get_logger(__name__)


class Reports:
    """Console, metrics file and trackers of a run.

    Args:
        accelerator (`Accelerator`): the run's.
        config (`TrainingConfig`): its configuration.
        parts (`Components`): its parts.
        start_step (`int`): step at which it starts.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, parts: Components, start_step: int) -> None:
        self.accelerator = accelerator
        self.config = config
        self.parts = parts
        self.log = RunLog(accelerator, config)
        self.meter = Meter(config.training.global_batch_size)
        self.progress: tqdm[Any] = tqdm(
            total=config.training.max_steps,
            initial=start_step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def announce(self) -> None:
        """Say what is trained, and what about it is questionable."""
        config, parts = self.config, self.parts
        precision = str(config.training.mixed_precision).replace("no", "full")
        logger.info(
            f"training {config.model.preset} ({parts.transformer.num_parameters():,} parameters) with "
            f"{config.alignment.preset}: {config.training.max_steps} steps of {config.training.global_batch_size} "
            f"images on {self.accelerator.num_processes} process(es), {precision} precision"
        )
        terms = ", ".join(parts.criterion.terms) or "none"
        logger.info(f"alignment terms: {terms}; token grid {parts.student_grid[0]} x {parts.student_grid[1]}")
        warn_if_average_is_young(config.training.ema_decay, config.training.max_steps)

    def advance(self) -> None:
        """Count a step on the progress bar."""
        # A terminal that was closed, or a `tee` that has ended, is no reason to lose a run.
        with suppress(OSError):
            self.progress.update()

    def log_values(self, step: int, learning_rate: float, replaced_images: int, skipped_steps: int) -> None:
        """Write the means since the last call; every process must call.

        Args:
            step (`int`): optimiser steps made.
            learning_rate (`float`): that of the next step.
            replaced_images (`int`): unreadable images replaced so far by all processes.
            skipped_steps (`int`): steps skipped so far.
        """
        values = self.meter.collect(self.accelerator)
        values["lr"] = learning_rate
        terms = self.parts.criterion.terms
        values |= {f"weight/{name}": term.schedule(step - 1) for name, term in terms.items()}
        values |= {"replaced_images": float(replaced_images), "skipped_steps": float(skipped_steps)}
        loss = f"{values['loss']:.4f}" if "loss" in values else "not finite"
        with suppress(OSError):
            self.progress.set_postfix_str(f"loss {loss}, {values['images_per_second']:.1f} img/s")
        self.log.log(values, step)

    def count(self, number: int) -> int:
        """The sum of a number over all processes; every process must call."""
        total = torch.tensor(number, device=self.accelerator.device)
        return int(self.accelerator.reduce(total, reduction="sum"))

    def close(self) -> None:
        """End the progress bar and let the trackers finish."""
        with suppress(OSError):
            self.progress.close()
        self.log.close()
