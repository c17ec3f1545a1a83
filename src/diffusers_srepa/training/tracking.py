"""Logged values: `metrics.jsonl` in the output folder, always, and any tracker that accelerate knows."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image

from diffusers_srepa.configuration.options import flatten
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.run_folder import METRICS_FILE


logger = get_logger(__name__)


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
        config (`TrainingConfig`): the resolved configuration, given to the trackers.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig) -> None:
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
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _count_lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0
