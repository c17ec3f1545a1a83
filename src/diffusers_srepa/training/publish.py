"""What the finished run tells the world: a model card, and the pipeline on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from diffusers_srepa.errors import in_options
from diffusers_srepa.publishing import hub
from diffusers_srepa.publishing.model_card import write_model_card
from diffusers_srepa.training.card_facts import facts_from_config
from diffusers_srepa.training.components import Components
from diffusers_srepa.training.config import TrainingConfig
from diffusers_srepa.training.run_folder import METRICS_FILE


logger = get_logger(__name__)


def claim_repository(config: TrainingConfig, accelerator: Accelerator) -> str | None:
    """The full id of the repository to push to, created before training; None if nothing is to be pushed.

    Raises:
        HubError: no token, no permission, an id that is not valid, or a Hub that cannot be reached.
    """
    if not config.push_to_hub:
        return None
    repository: list[str | None] = [None]
    if accelerator.is_main_process:
        name = config.hub_model_id or Path(str(config.output_dir)).resolve().name
        with in_options({"repo_id": "--hub_model_id"}):
            repository = [hub.create_repository(name, private=config.hub_private or None, license=config.hub_license)]
    return broadcast_object_list(repository)[0]


def push(output_dir: Path, repository: str, step: int) -> None:
    """Upload the finished pipeline; a Hub that fails costs a warning, never the run."""
    try:
        with in_options({"repo_id": "--hub_model_id"}):
            url = hub.push_folder(output_dir, repository, commit_message=f"Upload SiTPipeline after {step} steps")
    except hub.HubError as error:
        logger.warning(f"the pipeline was not pushed: {error}")
        return
    logger.info(f"pushed to {url}")


def write_card(config: TrainingConfig, parts: Components, output_dir: Path, step: int, repository: str | None) -> None:
    """Write the model card of the finished pipeline, with what this run measured and nothing else."""
    grid = output_dir / "validation" / f"step-{step}" / "grid.png"
    facts = facts_from_config(
        config,
        parts.transformer,
        steps=step,
        id2label=parts.id2label,
        sample_grid=grid if grid.exists() else None,
        losses=_last_losses(output_dir / METRICS_FILE),
        hub_id=repository,
    )
    write_model_card(output_dir, config=config.to_dict(), facts=facts)


def _last_losses(file: Path) -> dict[str, float]:
    """The raw losses of the last logged step, averages over the steps since the one logged before."""
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines:
        return {}
    record = json.loads(lines[-1])
    names = [name for name in record if name in ("loss", "flow", "class_token") or name.startswith("alignment/")]
    return {name: record[name] for name in names if isinstance(record[name], int | float)}
