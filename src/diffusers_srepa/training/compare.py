"""Which options of a resumed run differ from those of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.config import TrainingConfig
from diffusers_srepa.training.run_folder import CONFIG_FILE
from diffusers_srepa.training.tracking import flatten


# What may change without making another run of it: where things lie and go, how often, and how the work is divided.
# The dataset is compared by its content.
_FREE = (
    "output_dir",
    "resume_",
    "overwrite_output_dir",
    "expected_processes",
    "push_to_hub",
    "hub_",
    "model.gradient_checkpointing",
    "model.compile",
    "model.init_from",
    "data.dataset",
    "data.data_dir",
    "data.cache_dir",
    "data.latent_cache",
    "data.num_workers",
    "training.max_steps",
    "training.micro_batch_size",
    "training.log_every",
    "sampling.",
    "validation.",
    "checkpoints.",
    "tracking.",
)


def check_same_options(checkpoint: Path, config: TrainingConfig) -> None:
    """Refuse to go on from `checkpoint` with options that shape the training otherwise.

    Raises:
        ConfigurationError: naming every option that differs, unless `resume_with_changes` is set.
    """
    before = _flat(yaml.safe_load((checkpoint / CONFIG_FILE).read_text()))
    now = _flat(config.to_dict())
    changed = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(_FREE)
    ]
    if changed and not config.resume_with_changes:
        raise ConfigurationError(
            f"the checkpoint {checkpoint} was trained otherwise ({'; '.join(changed)}): set these options back, or "
            "set --resume_with_changes."
        )


def _flat(values: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in flatten(values).items()}
