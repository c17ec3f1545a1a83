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

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.config import TrackingConfig, TrainingConfig
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

    Args:
        accelerator (`Accelerator`): built with `resolve_trackers` as `log_with`.
        config (`TrainingConfig`): the resolved configuration, given to the trackers.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig) -> None:
        self.accelerator = accelerator
        self.file = Path(str(config.output_dir)) / METRICS_FILE
        self._tracking_works = True
        self._start(config.tracking, config.to_dict())

    def _start(self, tracking: TrackingConfig, config: Mapping[str, Any]) -> None:
        options: dict[str, Any] = {}
        if tracking.run_name is not None:
            options = {"wandb": {"name": tracking.run_name}, "swanlab": {"name": tracking.run_name}}
        try:
            self.accelerator.init_trackers(tracking.project_name, config=flatten(config), init_kwargs=options)
        except Exception as error:
            self._give_up(error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars under `step`; a value that is not finite is written as its name, so that the file stays JSON."""
        if not self.accelerator.is_main_process:
            return
        record = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        if self._tracking_works:
            try:
                self.accelerator.log(dict(values), step=step)
            except Exception as error:
                self._give_up(error)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """Give a picture to the trackers that take pictures."""
        if not (self.accelerator.is_main_process and self._tracking_works):
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
                self._give_up(error)

    def close(self) -> None:
        """Let the trackers finish, and the process group with them."""
        try:
            self.accelerator.end_training()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        # A tracker that cannot be reached is no reason to lose a run: the values stay in metrics.jsonl.
        self._tracking_works = False
        logger.warning(
            f"tracking is switched off for this run, because the tracker failed ({type(error).__name__}: {error}); "
            f"the values go on into {self.file}."
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested values under dotted names, with lists and None as text, as hyper-parameter tables take them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
