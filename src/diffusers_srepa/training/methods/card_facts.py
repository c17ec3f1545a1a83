"""What a model card states about the alignment of a run, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramKLAlignment, GramMSEAlignment
from diffusers_srepa.alignment.registry import build_terms
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
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.training.methods.build import known_taps, teacher_settings


_OBJECTIVES = {
    CosineAlignment: "projected tokens that have the direction of the teacher's, token by token",
    GramMSEAlignment: "the teacher's cosine similarity between every two tokens (squared error)",
    GramKLAlignment: "the teacher's distribution of each token's similarities to all others (KL divergence)",
}


def alignment_facts(config: TrainingConfig, transformer: Any) -> dict[str, Any]:
    """The fields of `ModelCardFacts` that the alignment decides.

    What the configuration says holds to the end: a term that has stopped, with its tap and its teacher, is stated too.

    Args:
        config (`TrainingConfig`): resolved.
        transformer (`ModelMixin`): the trained model, or one of its size, on any device.

    Raises:
        ConfigurationError: an alignment term that cannot be built, or that names a teacher that does not exist.
    """
    terms = _active_terms(config)
    teachers = {name: teacher_settings(config, name).name_or_path for name in _teacher_names(config, terms)}
    taps = _taps(config, terms, transformer)
    return {
        "method": config.alignment.preset,
        "teacher": teachers.pop(DEFAULT, None),
        "further_teachers": teachers,
        "depth": taps.pop(DEFAULT, None),
        "further_taps": taps,
        "terms": {name: _weight_text(as_schedule(term.weight)) for name, term in terms.items()},
        "objectives": [_OBJECTIVES[kind] for term in terms.values() if (kind := type(term.objective)) in _OBJECTIVES],
        "settings": _settings(config, terms),
    }


def _active_terms(config: TrainingConfig) -> dict[str, AlignmentTerm]:
    """The terms that weigh something at some step."""
    literals = {name: term for name, term in config.alignment.terms.items() if term is not None}
    terms = build_terms(literals)
    return {name: term for name, term in terms.items() if not as_schedule(term.weight).stopped(0)}


def _teacher_names(config: TrainingConfig, terms: Mapping[str, AlignmentTerm]) -> list[str]:
    names = {term.teacher for term in terms.values() if term.teacher is not None}
    return sorted(names | ({DEFAULT} if config.alignment.class_token_weight is not None else set()))


def _taps(config: TrainingConfig, terms: Mapping[str, AlignmentTerm], transformer: Any) -> dict[str, int | str]:
    """Block, counted from 1, or module path of every tap that a term reads."""
    known = known_taps(config, transformer)
    used = {term.tap for term in terms.values()}
    used |= {term.target.name for term in terms.values() if isinstance(term.target, Tap)}
    return {name: _block_number(known[name]) for name in sorted(used) if name in known}


def _block_number(tap: int | str) -> int | str:
    number = str(tap).removeprefix("transformer_blocks.")
    return int(number) + 1 if isinstance(tap, str) and number.isdigit() else tap


def _settings(config: TrainingConfig, terms: Mapping[str, AlignmentTerm]) -> dict[str, str]:
    """Rows of the card's table of settings."""
    alignment = config.alignment
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
    rows["Flow"] = f"{config.flow.path} path, {config.flow.timestep_sampling} times"
    return rows


def _literal_text(literal: str | Mapping[str, Any]) -> str:
    if isinstance(literal, str):
        return literal
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
