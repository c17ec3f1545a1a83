"""What a model card states about a run: what its configuration decides, what its method knows, what was measured."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers_srepa.configuration.options import walk
from diffusers_srepa.configuration.training import RunConfig
from diffusers_srepa.models.presets import find_preset
from diffusers_srepa.publishing.model_card import ModelCardFacts, write_model_card
from diffusers_srepa.schedulers.registry import SCHEDULER_TITLES
from diffusers_srepa.training.distributed import DEFAULT_PRECISION
from diffusers_srepa.training.method import TrainingMethod
from diffusers_srepa.training.run_folder import METRICS_FILE


def facts_from_config(config: RunConfig, transformer: Any, **facts: Any) -> ModelCardFacts:
    """The facts of a card, for a finished run and for a recipe alike.

    Args:
        config (`RunConfig`): resolved.
        transformer (`ModelMixin`): the trained model, or one of its size, on any device.
        **facts: further fields of `ModelCardFacts`, such as those of the method, `hub_id` and `losses`; they win over
            the configuration's, and their `settings` come before its rows.
    """
    # A recipe leaves the precision to the launcher, and without its word it is this.
    precision = config.training.mixed_precision or DEFAULT_PRECISION
    values: dict[str, Any] = {
        "model_name": model_name(config, transformer),
        "num_parameters": transformer.num_parameters(),
        "resolution": config.data.resolution,
        "num_classes": transformer.config.num_classes,
        "dataset": str(config.data.dataset),
        "method": config.method,
        "steps": config.training.max_steps,
        "global_batch_size": config.training.global_batch_size,
        "learning_rate": config.optimizer.lr,
        "ema_decay": config.training.ema_decay,
        "precision": {"no": "fp32"}.get(precision, precision),
        "vae": config.latents.vae,
        "init_from": config.model.init_from,
        "num_inference_steps": config.sampling.num_inference_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "license": config.hub_license,
    }
    settings = {**facts.pop("settings", {}), **_settings(config)}
    return ModelCardFacts(**{**values, **facts}, settings=settings)


def write_card(
    config: RunConfig,
    method: TrainingMethod,
    pipeline: Any,
    output_dir: Path,
    step: int,
    id2label: Mapping[int, str] | None,
    repository: str | None,
    loss_names: Collection[str] = (),
) -> None:
    """Write the model card of the finished pipeline, with what this run measured and nothing else."""
    grid = output_dir / "validation" / f"step-{step}" / "grid.png"
    facts = facts_from_config(
        config,
        pipeline.transformer,
        **method.card_facts(),
        steps=step,
        id2label=id2label,
        sample_grid=grid if grid.exists() else None,
        losses=_last_losses(output_dir / METRICS_FILE, loss_names),
        hub_id=repository,
    )
    write_model_card(output_dir, config=config.to_dict(), facts=facts)


def model_name(config: RunConfig, transformer: Any) -> str:
    """The preset's name, unless the model is not of that size."""
    transformer_class, sizes = find_preset(config.model.preset)
    if not isinstance(transformer, transformer_class):
        return type(transformer).__name__
    family = config.model.preset.partition("-")[0]
    if config.model.init_from is not None:
        return family
    changed = any(getattr(config.model, name, None) not in (None, value) for name, value in sizes.items())
    return f"{family} of a size of its own" if changed else config.model.preset


def _settings(config: RunConfig) -> dict[str, str]:
    """The rest of what shapes a training, by the name of its row in the card."""
    optimizer, sampling = config.optimizer, config.sampling
    schedule = optimizer.lr_schedule
    if optimizer.lr_warmup_steps:
        schedule += f" after {optimizer.lr_warmup_steps:,} steps of warm-up"
    rows = {
        "Optimizer": f"AdamW, betas {tuple(optimizer.betas)}, eps {optimizer.eps}, weight decay "
        f"{optimizer.weight_decay}, learning rate {schedule}",
        "Gradient norm": f"clipped at {optimizer.max_grad_norm}" if optimizer.max_grad_norm else "not clipped",
    }
    for _, declared, value in walk(config):
        if declared.card is not None and value is not None:
            rows[declared.card] = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    rows["Sampler"] = f"{SCHEDULER_TITLES[sampling.scheduler]}, {sampling.num_inference_steps} steps"
    return rows


def _last_losses(file: Path, loss_names: Collection[str]) -> dict[str, float]:
    """The raw losses of the last logged step, averages over the steps since the one logged before.

    A resume of a run that was at its end makes no step and knows only the names of the losses that there usually are.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines:
        return {}
    record = json.loads(lines[-1])
    usual = ("loss", "flow", "class_token", *(name for name in record if name.startswith("alignment/")))
    names = [name for name in record if name in (loss_names or usual)]
    return {name: record[name] for name in names if isinstance(record[name], int | float)}
