"""Which checkpoint a run goes on from, and whether it is the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from diffusers_srepa.data.batches import check_same_stream
from diffusers_srepa.errors import ConfigurationError, in_options
from diffusers_srepa.training.checkpoint_folder import find_checkpoint
from diffusers_srepa.training.checkpoints import RunState, read_state
from diffusers_srepa.training.compare import check_same_options
from diffusers_srepa.training.config import TrainingConfig


logger = get_logger(__name__)


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Args:
        folder: The checkpoint.
        state: Its scalars.
    """

    folder: Path
    state: RunState


def find_resume(config: TrainingConfig, dataset: Any, num_processes: int) -> Resumed | None:
    """The checkpoint that the configuration asks for; None for a run from the beginning.

    Args:
        config (`TrainingConfig`): the new run's configuration.
        dataset: its dataset.
        num_processes (`int`): number of its processes.

    Raises:
        ConfigurationError: no such checkpoint, a damaged one, or one of a run that was another.
    """
    if not config.resume_from_checkpoint:
        return None
    output_dir = Path(str(config.output_dir))
    folder = find_checkpoint(output_dir, config.resume_from_checkpoint)
    if folder is None:
        logger.warning(f"there is no checkpoint in {output_dir} yet: the run starts from the beginning.")
        return None
    check_same_options(folder, config)
    state = read_state(folder)
    _check_same_run(folder, state, config, dataset.fingerprint)
    if not config.resume_with_changes:
        with in_options({"resume_with_changes": "--resume_with_changes"}):
            check_same_stream(dataset, state.num_processes, num_processes)
    if state.step > config.training.max_steps:
        raise ConfigurationError(
            f"the checkpoint {folder} is at step {state.step}, but training.max_steps is "
            f"{config.training.max_steps}: raise it, or resume from an earlier checkpoint."
        )
    return Resumed(folder, state)


def _check_same_run(folder: Path, state: RunState, config: TrainingConfig, dataset_fingerprint: str) -> None:
    compared = {
        "seed": (state.seed, config.seed),
        "training.global_batch_size": (state.global_batch_size, config.training.global_batch_size),
        "the dataset's fingerprint": (state.dataset_fingerprint, dataset_fingerprint),
    }
    for name, (before, now) in compared.items():
        if before != now:
            raise ConfigurationError(
                f"the checkpoint {folder} cannot be continued exactly: {name} was {before} and is {now} now."
            )
