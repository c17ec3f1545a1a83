"""What a model card states about a run, read from its configuration: for a finished run and for a recipe alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_srepa.alignment.build import build_terms
from diffusers_srepa.alignment.objectives.cosine import CosineAlignment
from diffusers_srepa.alignment.objectives.gram_kl import GramKLAlignment
from diffusers_srepa.alignment.objectives.gram_mse import GramMSEAlignment
from diffusers_srepa.alignment.presets import default_depth
from diffusers_srepa.alignment.schedule import (
    Constant,
    CosineDecay,
    HardStop,
    LinearDecay,
    Product,
    Schedule,
    WarmUp,
    as_schedule,
)
from diffusers_srepa.alignment.term import DEFAULT, AlignmentTerm, Tap
from diffusers_srepa.models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from diffusers_srepa.publishing.card_facts import ModelCardFacts
from diffusers_srepa.training.config import TrainingConfig
from diffusers_srepa.training.teachers import teacher_settings


_OBJECTIVES = {
    CosineAlignment: "projected tokens that have the direction of the teacher's, token by token",
    GramMSEAlignment: "the teacher's cosine similarity between every two tokens (squared error)",
    GramKLAlignment: "the teacher's distribution of each token's similarities to all others (KL divergence)",
}
_SAMPLERS = {"euler-maruyama": "Euler-Maruyama (SDE)", "euler": "Euler (ODE)"}


def facts_from_config(config: TrainingConfig, transformer: SiTTransformer2DModel, **facts: Any) -> ModelCardFacts:
    """The facts of a card, those that the configuration decides and the given ones.

    What the configuration says holds to the end: a term that has stopped, with its tap and its teacher, is stated too.

    Args:
        config (`TrainingConfig`): resolved.
        transformer (`SiTTransformer2DModel`): the trained model, or one of its size, on any device.
        **facts: further fields of `ModelCardFacts`, such as `hub_id` and `losses`; they win over the configuration's.

    Raises:
        ConfigurationError: an alignment term that cannot be built, or that names a teacher that does not exist.
    """
    terms = _active_terms(config)
    teachers = {name: teacher_settings(config, name).name_or_path for name in _teacher_names(config, terms)}
    taps = _taps(config, terms, transformer)
    values: dict[str, Any] = {
        "model_name": model_name(config),
        "num_parameters": transformer.num_parameters(),
        "resolution": config.data.resolution,
        "num_classes": transformer.config.num_classes,
        "dataset": str(config.data.dataset),
        "method": config.alignment.preset,
        "steps": config.training.max_steps,
        "global_batch_size": config.training.global_batch_size,
        "learning_rate": config.optimizer.lr,
        "ema_decay": config.training.ema_decay,
        "precision": {"no": "fp32"}.get(config.training.mixed_precision, config.training.mixed_precision),
        "vae": config.latents.vae,
        "teacher": teachers.pop(DEFAULT, None),
        "further_teachers": teachers,
        "depth": taps.pop(DEFAULT, None),
        "further_taps": taps,
        "terms": {name: _weight_text(as_schedule(term.weight)) for name, term in terms.items()},
        "objectives": [_OBJECTIVES[kind] for term in terms.values() if (kind := type(term.objective)) in _OBJECTIVES],
        "settings": _settings(config, terms),
        "init_from": config.model.init_from,
        "num_inference_steps": config.sampling.num_inference_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "license": config.hub_license,
    }
    return ModelCardFacts(**{**values, **facts})


def model_name(config: TrainingConfig) -> str:
    """The preset's name, unless the model is not of that size."""
    model = config.model
    if model.init_from is not None:
        return "SiT"
    sizes = SIT_PRESETS[model.preset]
    changed = any(getattr(model, name) not in (None, value) for name, value in sizes.items())
    return "SiT of a size of its own" if changed else model.preset


def _active_terms(config: TrainingConfig) -> dict[str, AlignmentTerm]:
    """The terms that weigh something at some step."""
    literals = {name: term for name, term in config.alignment.terms.items() if term is not None}
    terms = build_terms(literals)
    return {name: term for name, term in terms.items() if not as_schedule(term.weight).stopped(0)}


def _teacher_names(config: TrainingConfig, terms: Mapping[str, AlignmentTerm]) -> list[str]:
    names = {term.teacher for term in terms.values() if term.teacher is not None}
    return sorted(names | ({DEFAULT} if config.alignment.class_token_weight is not None else set()))


def _taps(
    config: TrainingConfig, terms: Mapping[str, AlignmentTerm], transformer: SiTTransformer2DModel
) -> dict[str, int | str]:
    """Block, counted from 1, or module path of every tap that a term reads."""
    alignment, num_layers = config.alignment, len(transformer.transformer_blocks)
    known = {
        DEFAULT: alignment.tap or alignment.depth or default_depth(num_layers, transformer.inner_dim),
        **alignment.taps,
    }
    used = {term.tap for term in terms.values()}
    used |= {term.target.name for term in terms.values() if isinstance(term.target, Tap)}
    return {name: _block_number(known[name]) for name in sorted(used) if name in known}


def _block_number(tap: int | str) -> int | str:
    number = str(tap).removeprefix("transformer_blocks.")
    return int(number) + 1 if isinstance(tap, str) and number.isdigit() else tap


def _settings(config: TrainingConfig, terms: Mapping[str, AlignmentTerm]) -> dict[str, str]:
    """The rest of what shapes a training, by the name of its row in the card."""
    alignment, optimizer, sampling = config.alignment, config.optimizer, config.sampling
    schedule = optimizer.lr_schedule
    if optimizer.lr_warmup_steps:
        schedule += f" after {optimizer.lr_warmup_steps:,} steps of warm-up"
    rows: dict[str, str] = {}
    for name in terms:
        literal = alignment.terms[name]
        objective = literal.get("objective") if isinstance(literal, Mapping) else None
        if isinstance(objective, Mapping) and len(objective) > 1:
            rows[f"Objective of `{name}`"] = _literal_text(objective)
    if terms and alignment.projector is not None:
        rows["Projector"] = _literal_text(alignment.projector)
    if terms and alignment.target_transform is not None:
        rows["Teacher tokens"] = _literal_text(alignment.target_transform)
    if alignment.class_token_weight is not None:
        rows["Weight of the class token's flow loss"] = str(alignment.class_token_weight)
    rows |= {
        "Optimizer": f"AdamW, betas {tuple(optimizer.betas)}, eps {optimizer.eps}, weight decay "
        f"{optimizer.weight_decay}, learning rate {schedule}",
        "Gradient norm": f"clipped at {optimizer.max_grad_norm}" if optimizer.max_grad_norm else "not clipped",
        "Label dropout": str(config.model.class_dropout_prob),
        "Flow": f"{config.flow.path} path, {config.flow.timestep_law} times",
        "Horizontal flips": "yes" if config.data.horizontal_flip else "no",
        "Sampler": f"{_SAMPLERS[sampling.scheduler]}, {sampling.num_inference_steps} steps",
    }
    return rows


def _literal_text(literal: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{key} {value}" for key, value in literal.items() if key != "name")
    return f"{literal['name']} ({arguments})" if arguments else str(literal["name"])


def _weight_text(schedule: Schedule) -> float | str:
    """A constant weight as a number, any other schedule in words."""
    match schedule:
        case Constant():
            return float(schedule.value)
        case HardStop():
            return f"{schedule.value} until step {schedule.step:,}, then 0"
        case WarmUp():
            return f"rising to {schedule.value} over {schedule.num_steps:,} steps"
        case LinearDecay() | CosineDecay():
            shape = "half a cosine" if isinstance(schedule, CosineDecay) else "a straight line"
            steps = f"from step {schedule.begin:,} to {schedule.end:,}"
            return f"{schedule.initial} to {schedule.final} along {shape} {steps}"
        case Product():
            return " times ".join(f"({_weight_text(factor)})" for factor in schedule.factors)
    return repr(schedule)
