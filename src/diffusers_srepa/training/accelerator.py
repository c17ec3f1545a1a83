"""The `Accelerator` of a run: precision, trackers, sharding, and what accelerate leaves to its user."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.tracking import resolve_trackers


# The other processes wait while one downloads a dataset, samples validation images or writes a checkpoint. A process
# that dies does not need this limit to be noticed: the launcher ends the others.
LONGEST_WAIT = timedelta(hours=3)


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator that configuration and launcher describe.

    Raises:
        ConfigurationError: a tracker that is not there, or fp16 on the CPU.
    """
    output_dir = Path(str(config.output_dir))
    precision = config.training.mixed_precision
    # Accelerate keeps the precision of the first run in a process for all later ones.
    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=resolve_trackers(config.tracking.report_to),
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
    return accelerator
