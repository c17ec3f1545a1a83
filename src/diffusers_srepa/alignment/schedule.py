"""Weights of alignment terms as functions of the training step.

A schedule is a pure function of the step, so a resumed run needs no state. Some end for good: HASTE (Wang et al. 2025,
arXiv 2505.16792) found that alignment helps early and hurts late. `stop_step` tells the trainer when, so that it can
let go of teacher and projector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from diffusers_srepa.errors import ConfigurationError


@dataclass(frozen=True)
class Schedule(ABC):
    """A weight >= 0 for every step >= 0."""

    @abstractmethod
    def __call__(self, step: float) -> float:
        """The weight at `step`, the number of optimiser steps made before."""

    @property
    @abstractmethod
    def stop_step(self) -> int | None:
        """The first step from which on the weight is 0 for ever; None if there is none."""

    def stopped(self, step: float) -> bool:
        """Whether the weight is 0 at `step` and at every later step."""
        return self.stop_step is not None and step >= self.stop_step

    def __mul__(self, other: Schedule | float) -> Product:
        return Product((self, as_schedule(other)))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Constant(Schedule):
    """The same weight at every step.

    Args:
        value (`float`): the weight, >= 0.
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        _check_weights(value=self.value)

    def __call__(self, step: float) -> float:
        return float(self.value)

    @property
    def stop_step(self) -> int | None:
        return 0 if self.value == 0 else None


@dataclass(frozen=True)
class _Decay(Schedule):
    """From `initial` (until step `begin`) to `final` (from step `end` on), both reached exactly.

    Args:
        end (`int`): the step from which on the weight is `final`.
        initial (`float`): the weight until `begin`.
        final (`float`): the weight from `end` on.
        begin (`int`): the step at which the decay begins.
    """

    end: int
    initial: float = 1.0
    final: float = 0.0
    begin: int = 0

    def __post_init__(self) -> None:
        _check_weights(initial=self.initial, final=self.final)
        _check_steps(begin=self.begin, end=self.end)
        if self.begin >= self.end:
            raise ConfigurationError(
                f"the decay schedule begins at step {self.begin} and ends at {self.end}: begin must come before end."
            )

    def __call__(self, step: float) -> float:
        if step <= self.begin:
            return float(self.initial)
        if step >= self.end:
            return float(self.final)
        share = self.share_left((step - self.begin) / (self.end - self.begin))
        return self.final + (self.initial - self.final) * share

    @abstractmethod
    def share_left(self, progress: float) -> float:
        """The share of the way that is left, 1 at progress 0 and 0 at progress 1."""

    @property
    def stop_step(self) -> int | None:
        if self.final > 0:
            return None
        return self.end if self.initial > 0 else 0


@dataclass(frozen=True)
class LinearDecay(_Decay):
    """A straight line from `initial` at step `begin` to `final` at step `end`, constant before and after."""

    def share_left(self, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True)
class CosineDecay(_Decay):
    """Half a cosine from `initial` at step `begin` to `final` at step `end`, constant before and after."""

    def share_left(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class HardStop(Schedule):
    """A constant weight before `step`, 0 from `step` on (HASTE's termination).

    Args:
        step (`int`): the first step without alignment.
        value (`float`): the weight before it, >= 0.
    """

    step: int
    value: float = 1.0

    def __post_init__(self) -> None:
        _check_steps(step=self.step)
        _check_weights(value=self.value)

    def __call__(self, step: float) -> float:
        return float(self.value) if step < self.step else 0.0

    @property
    def stop_step(self) -> int | None:
        return self.step if self.value > 0 else 0


@dataclass(frozen=True)
class WarmUp(Schedule):
    """A straight line from 0 at step 0 to `value` at step `num_steps`, constant from there on.

    Args:
        num_steps (`int`): length of the rise, >= 1.
        value (`float`): the weight after it, >= 0.
    """

    num_steps: int
    value: float = 1.0

    def __post_init__(self) -> None:
        _check_steps(num_steps=self.num_steps)
        _check_weights(value=self.value)
        if self.num_steps == 0:
            raise ConfigurationError("the warm_up schedule's num_steps is 0, but must be at least 1.")

    def __call__(self, step: float) -> float:
        return float(self.value) if step >= self.num_steps else self.value * max(step, 0) / self.num_steps

    @property
    def stop_step(self) -> int | None:
        return 0 if self.value == 0 else None


@dataclass(frozen=True)
class Product(Schedule):
    """The product of schedules, for instance a warm-up, a decay and a hard stop. It ends when the first factor ends.

    Args:
        factors (`tuple[Schedule | float, ...]`): at least one.
    """

    factors: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        if not self.factors:
            raise ConfigurationError("the product schedule has no factors, but needs at least one.")
        object.__setattr__(self, "factors", tuple(as_schedule(factor) for factor in self.factors))

    def __call__(self, step: float) -> float:
        return math.prod(factor(step) for factor in self.factors)

    @property
    def stop_step(self) -> int | None:
        ends = [factor.stop_step for factor in self.factors]
        return min((end for end in ends if end is not None), default=None)


def as_schedule(weight: Schedule | float) -> Schedule:
    """A number as a constant schedule; a schedule as it is.

    Raises:
        ConfigurationError: it is neither, or a negative or non-finite number.
    """
    return weight if isinstance(weight, Schedule) else Constant(weight)


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ConfigurationError(
                f"{name} of an alignment weight is {weight!r}, but must be a finite number of at least 0 (or a "
                "schedule)."
            )


def _check_steps(**steps: int) -> None:
    for name, step in steps.items():
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ConfigurationError(
                f"{name} of a weight schedule is {step!r}, but must be a whole number of at least 0."
            )
