"""What a run tells while it goes: console, progress bar, `metrics.jsonl`, and the trackers that accelerate knows."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from tqdm import tqdm

from diffusers_srepa.configuration.options import flatten
from diffusers_srepa.configuration.training import RunConfig
from diffusers_srepa.errors import ConfigurationError, one_line
from diffusers_srepa.training.optimizers import warn_if_average_is_young
from diffusers_srepa.training.run_folder import METRICS_FILE


logger = get_logger(__name__)


def set_up_console(level: int = logging.INFO) -> None:
    """Show this package's messages from `level` on, and warnings of everything else, as plain lines."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("diffusers_srepa").setLevel(level)


class Meter:
    """Collects the values of every step between two logged ones, on the device and without waiting for it.

    Args:
        images_per_step (`int`): the global batch size.
    """

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._paused = 0.0
        self._since = time.perf_counter()

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add the scalars of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1

    def exclude(self, seconds: float) -> None:
        """Do not count time spent on checkpoints and validation as training time."""
        self._paused += seconds

    def collect(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over steps and processes since the last call, and `images_per_second`; every rank must call."""
        names = sorted(self._sums)
        values: dict[str, float] = {}
        if names:
            # A term that ended within the interval has fewer values than steps.
            means = torch.stack([self._sums[name].float() / self._counts[name] for name in names])
            values = dict(zip(names, accelerator.reduce(means, reduction="mean").tolist(), strict=True))
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        values["images_per_second"] = self._steps * self.images_per_step / seconds
        self._sums, self._counts, self._steps, self._paused = {}, {}, 0, 0.0
        self._since = time.perf_counter()
        return values


def resolve_trackers(report_to: str) -> str | None:
    """The `log_with` of an `Accelerator` for the option `tracking.report_to`.

    Raises:
        ConfigurationError: accelerate does not know the tracker, or its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if report_to == "none":
        return None
    if report_to == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") is not None else None
    if report_to == "all":
        return "all"
    available = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    if report_to not in available:
        known = report_to in [str(getattr(name, "value", name)) for name in LOGGER_TYPE_TO_CLASS]
        reason = "is not installed" if known else "is not a tracker of accelerate"
        raise ConfigurationError(
            f"tracking.report_to is {report_to!r}, which {reason}: "
            f"use {', '.join(['auto', 'none', 'all', *available])}."
        )
    return report_to


class RunLog:
    """Writes the values of a run, on the main process alone.

    A tracker that fails is no reason to lose a run: the values go on into `metrics.jsonl`, and the tracker gets those
    that it missed when the run ends.

    Args:
        accelerator (`Accelerator`): built with `resolve_trackers` as `log_with`.
        config (`RunConfig`): the resolved configuration, given to the trackers.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig) -> None:
        self.accelerator = accelerator
        self.file = Path(str(config.output_dir)) / METRICS_FILE
        self._config = config
        self._has_started = False
        # Number of the first line of the file that the trackers have not got, while they fail.
        self._missed_from: int | None = None
        self._lines = _count_lines(self.file)
        try:
            self._start()
        except Exception as error:
            self._note_failure(error)

    def _start(self) -> None:
        name = self._config.tracking.run_name
        options: dict[str, Any] = {} if name is None else {"wandb": {"name": name}, "swanlab": {"name": name}}
        self.accelerator.trackers = []
        self.accelerator.init_trackers(
            self._config.tracking.project_name, config=flatten(self._config.to_dict()), init_kwargs=options
        )
        self._has_started = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars under `step`; a value that is not finite is written as its name, so that the file stays JSON."""
        if not self.accelerator.is_main_process:
            return
        record = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        if self._missed_from is None:
            try:
                self.accelerator.log(dict(values), step=step)
            except Exception as error:
                self._note_failure(error)
        self._lines += 1

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """Give a picture to the trackers that take pictures."""
        if not self.accelerator.is_main_process or self._missed_from is not None:
            return
        import numpy as np

        for tracker in self.accelerator.trackers:
            try:
                if tracker.name == "tensorboard":
                    tracker.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
                elif tracker.name == "wandb":
                    import wandb

                    tracker.log({name: wandb.Image(image)}, step=step)
            except Exception as error:
                self._note_failure(error)

    def close(self) -> None:
        """Send what a tracker missed, and let the trackers finish, and the process group with them."""
        if self.accelerator.is_main_process and self._missed_from is not None:
            self._send_missed(self._missed_from)
        try:
            self.accelerator.end_training()
        except Exception as error:
            logger.warning(f"the tracker did not finish ({_describe(error)}); all values are in {self.file}.")

    def _send_missed(self, first: int) -> None:
        try:
            if not self._has_started:
                self._start()
            for line in self.file.read_text().splitlines()[first:]:
                record = json.loads(line)
                step = record.pop("step")
                self.accelerator.log({name: float(value) for name, value in record.items()}, step=step)
            logger.info("the tracker can be reached again and has got the values that it missed.")
        except Exception as error:
            logger.warning(f"the tracker still fails ({_describe(error)}); all values are in {self.file}.")

    def _note_failure(self, error: Exception) -> None:
        if self._missed_from is None:
            self._missed_from = self._lines
            logger.warning(
                f"the tracker failed ({_describe(error)}): the values go on into {self.file} and are sent to it at "
                "the end."
            )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _count_lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


class Progress:
    """Console, metrics file and trackers of a run.

    Args:
        accelerator (`Accelerator`): the run's.
        config (`RunConfig`): its configuration.
        start_step (`int`): step at which it starts.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, start_step: int) -> None:
        self.accelerator = accelerator
        self.config = config.training
        self.log = RunLog(accelerator, config)
        self.meter = Meter(config.training.global_batch_size)
        self.bar: tqdm[Any] = tqdm(
            total=config.training.max_steps,
            initial=start_step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def announce(self, lines: Sequence[str]) -> None:
        """Say what is trained, `lines` from the method, and what about it is questionable."""
        config = self.config
        precision = str(config.mixed_precision).replace("no", "full")
        logger.info(
            f"training {lines[0]}: {config.max_steps} steps of {config.global_batch_size} images on "
            f"{self.accelerator.num_processes} process(es), {precision} precision"
        )
        for line in lines[1:]:
            logger.info(line)
        warn_if_average_is_young(config.ema_decay, config.max_steps)

    def advance(self) -> None:
        """Count a step on the progress bar."""
        # A terminal that was closed, or a `tee` that has ended, is no reason to lose a run.
        with suppress(OSError):
            self.bar.update()

    def log_values(self, step: int, more: Mapping[str, float]) -> None:
        """Write the means since the last call, with `more`, under `step`; every process must call."""
        values = {**self.meter.collect(self.accelerator), **more}
        loss = f"{values['loss']:.4f}" if "loss" in values else "not finite"
        with suppress(OSError):
            self.bar.set_postfix_str(f"loss {loss}, {values['images_per_second']:.1f} img/s")
        self.log.log(values, step)

    def close(self) -> None:
        """End the progress bar and let the trackers finish."""
        with suppress(OSError):
            self.bar.close()
        self.log.close()
