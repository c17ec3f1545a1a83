"""Which checkpoint a run goes on from, and whether it is the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from diffusers_srepa.configuration.comparison import differing_options
from diffusers_srepa.configuration.training import RunConfig
from diffusers_srepa.data.batches import check_same_stream
from diffusers_srepa.errors import ConfigurationError, one_line
from diffusers_srepa.training.checkpoint import RunState, read_state
from diffusers_srepa.training.run_folder import CONFIG_FILE, find_checkpoint


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


def find_resume(config: RunConfig, accelerator: Accelerator) -> Resumed | None:
    """The checkpoint that the configuration asks for; None for a run from the beginning.

    The main process alone reads and hashes the files; every process must call.

    Raises:
        ConfigurationError: no such checkpoint, a damaged one, or one of a run with other options.
    """
    if not config.resume_from_checkpoint:
        return None
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [_find(config)]
        except ConfigurationError as error:
            found = [error]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            # The other processes wait for an answer, whatever is wrong with the files.
            found = [
                ConfigurationError(f"the checkpoint cannot be read ({one_line(error)}): resume from another one.")
            ]
    (resumed,) = broadcast_object_list(found)
    if isinstance(resumed, ConfigurationError):
        raise resumed
    return resumed


def _find(config: RunConfig) -> Resumed | None:
    output_dir = Path(str(config.output_dir))
    folder = find_checkpoint(output_dir, str(config.resume_from_checkpoint))
    if folder is None:
        logger.warning(f"there is no checkpoint in {output_dir} yet: the run starts from the beginning.")
        return None
    before = yaml.safe_load((folder / CONFIG_FILE).read_text())
    changes = differing_options(before, config.to_dict(), type(config))
    if changes and not config.resume_with_changes:
        raise ConfigurationError(
            f"the checkpoint {folder} was trained otherwise ({'; '.join(changes)}): set these options back, or set "
            "--resume_with_changes."
        )
    state = read_state(folder)
    if state.step > config.training.max_steps:
        raise ConfigurationError(
            f"the checkpoint {folder} is at step {state.step}, but training.max_steps is "
            f"{config.training.max_steps}: raise it, or resume from an earlier checkpoint."
        )
    return Resumed(folder, state)


def check_same_run(resumed: Resumed, config: RunConfig, dataset: Any, num_processes: int) -> None:
    """Refuse to go on with another seed, batch or dataset, or with a stream on another number of processes.

    Raises:
        ConfigurationError: naming what differs.
    """
    state = resumed.state
    compared = {
        "seed": (state.seed, config.seed),
        "training.global_batch_size": (state.global_batch_size, config.training.global_batch_size),
        "the dataset's fingerprint": (state.dataset_fingerprint, dataset.fingerprint),
    }
    for name, (before, now) in compared.items():
        if before != now:
            raise ConfigurationError(
                f"the checkpoint {resumed.folder} cannot be continued exactly: {name} was {before} and is {now} now."
            )
    if not config.resume_with_changes:
        check_same_stream(dataset, state.num_processes, num_processes)
