"""What the finished run tells the world: a model card, and the pipeline on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.models.transformer_sit import SIT_PRESETS
from diffusers_srepa.training import hub
from diffusers_srepa.training.components import Components
from diffusers_srepa.training.config import TrainingConfig
from diffusers_srepa.training.model_card import ModelCardFacts, write_model_card
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
        repository = [hub.create_repository(name, private=config.hub_private or None, license=config.hub_license)]
    return broadcast_object_list(repository)[0]


def push(output_dir: Path, repository: str, step: int) -> None:
    """Upload the finished pipeline; a Hub that fails costs a warning, never the run."""
    try:
        url = hub.push_folder(output_dir, repository, commit_message=f"Upload SiTPipeline after {step} steps")
    except hub.HubError as error:
        logger.warning(f"the pipeline was not pushed: {error}")
        return
    logger.info(f"pushed to {url}")


def write_card(config: TrainingConfig, parts: Components, output_dir: Path, step: int, repository: str | None) -> None:
    """Write the model card of the finished pipeline, with what this run measured and nothing else."""
    transformer = parts.transformer
    needs_teacher = DEFAULT in parts.criterion.teachers() or config.alignment.class_token_weight is not None
    grid = output_dir / "validation" / f"step-{step}" / "grid.png"
    taps = [tap.path for tap in parts.student.taps.values()]
    facts = ModelCardFacts(
        model_name=_model_name(config),
        num_parameters=transformer.num_parameters(),
        resolution=config.data.resolution,
        num_classes=transformer.config.num_classes,
        dataset=str(config.data.dataset),
        method=config.alignment.preset,
        steps=step,
        global_batch_size=config.training.global_batch_size,
        learning_rate=config.optimizer.lr,
        ema_decay=config.training.ema_decay,
        precision={"no": "fp32"}.get(config.training.mixed_precision, config.training.mixed_precision),
        vae=config.latents.vae,
        teacher=config.teacher.name_or_path if needs_teacher else None,
        depth=_depth(taps),
        terms={name: term.schedule(0) for name, term in parts.criterion.terms.items()},
        init_from=config.model.init_from,
        id2label=parts.id2label,
        num_inference_steps=config.sampling.num_inference_steps,
        guidance_scale=config.sampling.guidance_scale,
        sample_grid=grid if grid.exists() else None,
        losses=_last_losses(output_dir / METRICS_FILE),
        hub_id=repository,
        license=config.hub_license,
    )
    write_model_card(output_dir, config=config.to_dict(), facts=facts)


def _model_name(config: TrainingConfig) -> str:
    """The preset's name, unless the model is not of that size."""
    model = config.model
    if model.init_from is not None:
        return "SiT"
    sizes = SIT_PRESETS[model.preset]
    changed = any(getattr(model, name) not in (None, value) for name, value in sizes.items())
    return "SiT of a size of its own" if changed else model.preset


def _depth(taps: list[str]) -> int | None:
    blocks = [path.removeprefix("transformer_blocks.") for path in taps]
    return int(blocks[0]) + 1 if len(blocks) == 1 and blocks[0].isdigit() else None


def _last_losses(file: Path) -> dict[str, float]:
    """The raw losses of the last logged step, averages over the steps since the one logged before."""
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines:
        return {}
    record = json.loads(lines[-1])
    names = [name for name in record if name in ("loss", "flow", "class_token") or name.startswith("alignment/")]
    return {name: record[name] for name in names if isinstance(record[name], int | float)}
