"""What is aligned with what, by which objective and how strongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.schedule import Schedule, as_schedule
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.tokens import TokenMap


DEFAULT = "default"
"""The name of the only tap, projector and teacher where there is one of each."""

FeatureKey = tuple[str, str | None]
"""A feature of the student: the name of a tap and that of the projector behind it, None for the tokens themselves."""


@dataclass(frozen=True)
class Tap:
    """Another feature of the student as a term's target, as in self-alignment across depth.

    Args:
        name (`str`): name of the tap.
        detach (`bool`, *optional*, defaults to True): keep the gradient from reaching the target.
        projector (`str`, *optional*): name of the projector behind the tap; by default the tokens themselves.

    Raises:
        ConfigurationError: a value of another type.
    """

    name: str
    detach: bool = True
    projector: str | None = None

    def __post_init__(self) -> None:
        _check_name("the name of a Tap", self.name)
        _check_name("the projector of a Tap", self.projector, optional=True)
        if not isinstance(self.detach, bool):
            raise ConfigurationError(f"the detach of a Tap is {self.detach!r}, but must be true or false.")

    @property
    def feature(self) -> FeatureKey:
        """The key under which `AlignedDenoiser` returns the tokens."""
        return (self.name, self.projector)


@dataclass
class AlignmentTerm:
    """One summand of the alignment loss.

    Args:
        objective (`AlignmentObjective`): how tokens are compared.
        weight (`float` or `Schedule`, *optional*, defaults to 1.0): the factor, >= 0; a number becomes a schedule.
        tap (`str`, *optional*, defaults to `"default"`): name of the tap whose tokens are aligned.
        target (`str` or `Tap`, *optional*, defaults to `"default"`):
            name of the teacher, or another tap of the student; ignored by objectives that need no target.
        projector (`str`, *optional*, defaults to `"default"`): name of the projector behind the tap; None compares
            the tokens themselves.
        target_transform (`Callable`, *optional*): applied to the target's `TokenMap` first, for instance
            `SpatialNorm()`.
        resample (`"area"` or `"bilinear"`, *optional*): bring the target's patch tokens to the student's grid before
            the transform; by default another grid is an error.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    objective: AlignmentObjective
    weight: float | Schedule = 1.0
    tap: str = DEFAULT
    target: str | Tap | None = DEFAULT
    projector: str | None = DEFAULT
    target_transform: Callable[[TokenMap], TokenMap] | None = None
    resample: Literal["area", "bilinear"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.objective, AlignmentObjective):
            raise ConfigurationError(
                f"the objective of an alignment term is {describe_value(self.objective)}, but must be an "
                "AlignmentObjective such as CosineAlignment()."
            )
        _check_name("the tap of an alignment term", self.tap)
        _check_name("the projector of an alignment term", self.projector, optional=True)
        if not isinstance(self.target, Tap):
            _check_name("the target of an alignment term", self.target, optional=True, other=" or a Tap")
        transform = self.target_transform
        # A class (an instance forgotten) or an objective would be called in vain.
        if transform is not None and (not callable(transform) or isinstance(transform, type | AlignmentObjective)):
            raise ConfigurationError(
                f"the target_transform of an alignment term is {describe_value(transform)}, but must be a function of "
                "a TokenMap such as SpatialNorm()."
            )
        self.weight = as_schedule(self.weight)
        if not self.objective.needs_target:
            self.target = None
        elif self.target is None:
            raise ConfigurationError(
                f"{type(self.objective).__name__} compares with a target, but the term's target is None: name a "
                "teacher or a Tap."
            )
        if isinstance(self.target, Tap):
            self._check_tap_target(self.target)
        if self.resample not in (None, "area", "bilinear"):
            raise ConfigurationError(
                f"the term's resample is {self.resample!r}, but must be 'area', 'bilinear' or None."
            )

    def _check_tap_target(self, target: Tap) -> None:
        if target.feature == self.feature:
            raise ConfigurationError(
                f"the term compares {describe_feature(self.feature)} with itself: change its target."
            )
        if not target.detach and self.objective.detaches_target:
            raise ConfigurationError(
                f"the term's target is Tap({target.name!r}, detach=False), but {type(self.objective).__name__} "
                "detaches every target: leave out detach=False, or use an objective with detaches_target=False."
            )

    @property
    def feature(self) -> FeatureKey:
        """The key under which `AlignedDenoiser` returns the tokens to align."""
        return (self.tap, self.projector)

    @property
    def features(self) -> tuple[FeatureKey, ...]:
        """All features of the student that the term reads, those of its target included."""
        return (self.feature, self.target.feature) if isinstance(self.target, Tap) else (self.feature,)

    @property
    def teacher(self) -> str | None:
        """The name of the teacher that the term needs, or None."""
        return self.target if isinstance(self.target, str) else None

    @property
    def schedule(self) -> Schedule:
        """The weight as a function of the step."""
        return as_schedule(self.weight)


def _check_name(what: str, name: object, optional: bool = False, other: str = "") -> None:
    if not isinstance(name, str) and not (optional and name is None):
        choices = "a name" + other + (" or None" if optional else "")
        raise ConfigurationError(f"{what} is {describe_value(name)}, but must be {choices}.")


def describe_value(value: object) -> str:
    """A wrong value for a sentence: as it is written in Python if that is short, else its type."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def describe_feature(key: FeatureKey) -> str:
    """A feature key in words."""
    tap, projector = key
    return f"tap {tap!r} without projector" if projector is None else f"tap {tap!r} through projector {projector!r}"
