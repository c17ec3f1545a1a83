"""The weighted sum of alignment terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.schedule import Schedule
from diffusers_srepa.alignment.term import DEFAULT, AlignmentTerm, FeatureKey, Tap, describe_feature, describe_value
from diffusers_srepa.errors import ConfigurationError, close_matches
from diffusers_srepa.tokens import TeacherFeatures, TokenMap, resize_token_map


@dataclass(frozen=True)
class AlignmentOutput:
    """The alignment of one batch.

    Args:
        loss (`torch.Tensor`): scalar with gradient, the sum of weight x value.
        values (`dict[str, torch.Tensor]`): the raw scalars of the terms by name, without their weights, in the graph;
            terms that have ended are missing.
        weights (`dict[str, float]`): the weights of all terms at this step.
    """

    loss: torch.Tensor
    values: dict[str, torch.Tensor]
    weights: dict[str, float]


class AlignmentLoss:
    """Values the terms of a batch: what is compared is chosen here, how is the objective's business.

    Objectives run in float32 (float64 where the student's tokens are), outside autocast. A term whose weight is 0 for
    good (a constant 0, a schedule that has ended) is not computed: its tokens may be missing. A weight that is 0 only
    for now, as at step 0 of a warm-up, is multiplied in, so that every projector takes part in every backward pass.

    Args:
        terms (`Mapping`): by name an `AlignmentTerm`, or `(objective, weight)` as shorthand for one tap, one teacher
            and one projector.

    Raises:
        ConfigurationError: it is no mapping, or an entry is neither.
    """

    def __init__(self, terms: Mapping[str, AlignmentTerm | tuple[AlignmentObjective, float | Schedule]]) -> None:
        if not isinstance(terms, Mapping):
            raise ConfigurationError(
                f"the terms of an AlignmentLoss are {describe_value(terms)}, but must be a dict such as "
                "{'cosine': (CosineAlignment(), 1.0)}."
            )
        self.terms = {name: _as_term(name, term) for name, term in terms.items()}

    def active_terms(self, step: float = 0) -> dict[str, AlignmentTerm]:
        """The terms whose weight is not 0 for good at `step`."""
        return {name: term for name, term in self.terms.items() if not term.schedule.stopped(step)}

    def features(self, step: float = 0) -> tuple[FeatureKey, ...]:
        """The features of the student that the active terms read: the `features` of an `AlignedDenoiser`."""
        return tuple(dict.fromkeys(key for term in self.active_terms(step).values() for key in term.features))

    def teachers(self, step: float = 0) -> tuple[str, ...]:
        """The names of the teachers that the active terms need."""
        names = (term.teacher for term in self.active_terms(step).values())
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def stop_steps(self) -> tuple[int, ...]:
        """The steps > 0 at which a term ends for good, in order."""
        ends = {term.schedule.stop_step for term in self.terms.values()}
        return tuple(sorted(end for end in ends if end))

    def __call__(
        self,
        tokens: Mapping[FeatureKey, TokenMap],
        targets: TeacherFeatures | Mapping[str, TeacherFeatures] | None = None,
        step: float = 0,
    ) -> AlignmentOutput:
        """The loss of a batch, averaged over its samples.

        Args:
            tokens (`Mapping`): the student's tokens by feature key, as `AlignedDenoiser` returns them.
            targets (`TeacherFeatures` or `Mapping`, *optional*): the features of the only teacher, or those of several
                by name; detached here.
            step (`float`): optimiser steps made so far.

        Raises:
            ConfigurationError: an argument of another kind, a feature or teacher that a term names is missing, or
                grids or prefix tokens do not fit.
            ValueError: what the objective itself refuses.
        """
        _check_call(tokens, targets, step)
        active = self.active_terms(step)
        teachers = self._name_teachers(targets, step)
        values = {name: _value(name, term, tokens, teachers) for name, term in active.items()}
        weights = {name: term.schedule(step) for name, term in self.terms.items()}
        # In the dtype and on the device of the tokens also where no term is active.
        loss = next((entry.float().tokens.new_zeros(()) for entry in tokens.values()), torch.zeros(()))
        for name, value in values.items():
            loss = loss + weights[name] * value
        return AlignmentOutput(loss, values, weights)

    def _name_teachers(
        self, targets: TeacherFeatures | Mapping[str, TeacherFeatures] | None, step: float
    ) -> Mapping[str, TeacherFeatures]:
        if targets is None:
            return {}
        if not isinstance(targets, TeacherFeatures):
            return targets
        names = self.teachers(step) or (DEFAULT,)
        if len(names) > 1:
            raise ConfigurationError(
                f"the terms name the teachers {', '.join(map(repr, names))}, but got the features of one: pass a dict "
                "{name: features}."
            )
        return {names[0]: targets}


def _check_call(tokens: object, targets: object, step: object) -> None:
    if not isinstance(tokens, Mapping) or not all(isinstance(value, TokenMap) for value in tokens.values()):
        raise ConfigurationError(
            f"the student's tokens are {_kind(tokens)}, but must be the dict of TokenMaps that an AlignedDenoiser "
            "returns beside its velocity: pass its second output, or {('default', 'default'): TokenMap(tokens, grid)}."
        )
    named = targets if isinstance(targets, Mapping) else {DEFAULT: targets}
    if targets is not None and not all(isinstance(value, TeacherFeatures) for value in named.values()):
        raise ConfigurationError(
            f"the targets are {_kind(targets)}, but must be what a Teacher returns, or a dict of that by the "
            "teacher's name: pass teacher(images), or TeacherFeatures(patch_tokens, grid)."
        )
    if isinstance(step, bool) or not isinstance(step, int | float) or not step >= 0:
        raise ConfigurationError(f"the step is {step!r}, but must be the number of optimiser steps made so far, >= 0.")


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(sorted({type(entry).__name__ for entry in value.values()}))}"
    return f"a {type(value).__name__}"


def _as_term(name: str, term: AlignmentTerm | tuple[AlignmentObjective, float | Schedule]) -> AlignmentTerm:
    if isinstance(term, AlignmentTerm):
        return term
    if isinstance(term, tuple) and len(term) == 2:
        return AlignmentTerm(*term)
    raise ConfigurationError(
        f"the alignment term {name!r} is {describe_value(term)}, but must be an AlignmentTerm or a pair (objective, "
        "weight)."
    )


def _value(
    name: str,
    term: AlignmentTerm,
    tokens: Mapping[FeatureKey, TokenMap],
    teachers: Mapping[str, TeacherFeatures],
) -> torch.Tensor:
    """The raw value of one term, a scalar."""
    student = _find_feature(name, term.feature, tokens).float()
    target = _find_target(name, term, student, tokens, teachers)
    if target is not None:
        with torch.autocast(device_type=student.tokens.device.type, enabled=False):
            target = _fit_target(name, term, student, target)
    value = term.objective(student, target)
    expected = student.tokens.shape[:1] if term.objective.scope == "sample" else ()
    if value.shape != expected:
        raise ConfigurationError(
            f"{type(term.objective).__name__} of scope {term.objective.scope!r} returns shape {tuple(value.shape)}, "
            f"but must return {tuple(expected)}: change its scope or its reduction."
        )
    return value.mean()


def _find_feature(name: str, key: FeatureKey, tokens: Mapping[FeatureKey, TokenMap]) -> TokenMap:
    if key not in tokens:
        known = ", ".join(describe_feature(known_key) for known_key in tokens) or "no feature at all"
        raise ConfigurationError(
            f"the alignment term {name!r} reads {describe_feature(key)}, but the student returns {known}: change the "
            "term's tap or projector, or the features of the AlignedDenoiser."
        )
    return tokens[key]


def _find_target(
    name: str,
    term: AlignmentTerm,
    student: TokenMap,
    tokens: Mapping[FeatureKey, TokenMap],
    teachers: Mapping[str, TeacherFeatures],
) -> TokenMap | None:
    """The tokens to compare with, as they come; a teacher's class token only where the student has one to align."""
    if term.target is None:
        return None
    if isinstance(term.target, Tap):
        target = _find_feature(name, term.target.feature, tokens)
        return target.detach() if term.target.detach else target
    if term.target not in teachers:
        known = close_matches(term.target, teachers) if teachers else "no teacher's features were passed"
        raise ConfigurationError(
            f"the alignment term {name!r} names the teacher {term.target!r}, which is unknown: {known.rstrip('?')}."
        )
    features = teachers[term.target]
    with_class_token = student.num_prefix_tokens > 0 and term.objective.include_prefix_tokens
    if with_class_token and features.class_token is None:
        raise ConfigurationError(
            f"the alignment term {name!r} aligns the student's class token, but the teacher {term.target!r} has none: "
            "choose another teacher, or set include_prefix_tokens=False in the objective."
        )
    return features.token_map(include_class_token=with_class_token).detach()


def _fit_target(name: str, term: AlignmentTerm, student: TokenMap, target: TokenMap) -> TokenMap:
    """The target in the student's dtype, on its grid where `resample` allows that, and transformed."""
    target = target.with_tokens(target.tokens.to(student.tokens.dtype))
    if term.resample is not None:
        target = resize_token_map(target, student.grid, term.resample)
    if term.target_transform is not None:
        target = term.target_transform(target)
        if not isinstance(target, TokenMap):
            raise ConfigurationError(
                f"the target_transform of the alignment term {name!r} returns a {type(target).__name__}, but must "
                "return a TokenMap: use TokenMap.with_tokens."
            )
    return target
