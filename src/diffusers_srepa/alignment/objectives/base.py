"""What every alignment objective has in common: which tokens it sees, in which precision, and what it refuses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from diffusers_srepa.alignment.gram.normalize import compute_dtype
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.tokens import TokenMap


@dataclass(frozen=True)
class AlignmentObjective(ABC):
    """A loss between the tokens of a student and those of a target.

    Subclasses implement `compute` on plain tensors. They are called with autocast disabled, in float32 (float64 if
    every input is float64), and with the target detached unless `detaches_target` is false.

    Class attributes:
        scope: `"sample"` returns one value per sample, shape `(B,)`; `"batch"` compares samples with one another and
            returns a scalar.
        needs_target: whether a target is required; without the need, a given target is ignored.
        needs_equal_width: whether student and target tokens must have the same width D.
        min_tokens: the smallest number of tokens that makes sense.
        detaches_target: whether the gradient to the target is cut here, whoever the target is.

    Args:
        include_prefix_tokens (`bool`): whether class and register tokens take part, or patch tokens alone.

    Raises:
        ConfigurationError: `include_prefix_tokens` is no boolean.
    """

    scope: ClassVar[Literal["sample", "batch"]] = "sample"
    needs_target: ClassVar[bool] = True
    needs_equal_width: ClassVar[bool] = False
    min_tokens: ClassVar[int] = 1
    detaches_target: ClassVar[bool] = True

    include_prefix_tokens: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments; subclasses with arguments of their own call this first."""
        if not isinstance(self.include_prefix_tokens, bool):
            raise ConfigurationError(
                f"include_prefix_tokens of {type(self).__name__} is {self.include_prefix_tokens!r}, but must be true "
                f"or false."
            )

    def __call__(self, student: TokenMap, target: TokenMap | None = None) -> torch.Tensor:
        """The loss of `student` against `target`.

        Args:
            student (`TokenMap`): tokens of shape `(B, P + N, D_S)`, any float dtype.
            target (`TokenMap`, *optional*): tokens of shape `(B, P + N, D_T)` on the same grid.

        Returns:
            `torch.Tensor`: shape `(B,)` for scope `"sample"`, `()` for scope `"batch"`; float32 or float64.

        Raises:
            ValueError: the target is missing, or batch sizes, devices, grids, prefix tokens, widths or token counts do
                not fit (a `ConfigurationError` for grids and prefix tokens).
        """
        if not self.needs_target:
            target = None
        self.check(student, target)
        student_tokens = self._select(student)
        with torch.autocast(device_type=student_tokens.device.type, enabled=False):
            if target is None:
                return self.compute(student_tokens.to(compute_dtype(student_tokens)), None)  # type: ignore[arg-type]
            target_tokens = self._select(target.detach() if self.detaches_target else target)
            dtype = compute_dtype(student_tokens, target_tokens)
            return self.compute(student_tokens.to(dtype), target_tokens.to(dtype))

    @abstractmethod
    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss on raw tokens `(B, N, D_S)` and `(B, N, D_T)`: `(B,)` or a scalar, as `scope` says.

        Objectives that need no target are given None.
        """

    def check(self, student: TokenMap, target: TokenMap | None) -> None:
        """Raise `ValueError` unless this objective can compare these tokens."""
        name = type(self).__name__
        for role, token_map in (("student", student), ("target", target)):
            if not isinstance(token_map, TokenMap) and (role == "student" or token_map is not None):
                raise ValueError(
                    f"{name} compares two TokenMaps, but the {role} is a {type(token_map).__name__}: wrap tokens in "
                    f"TokenMap(tokens, grid), and take token_map() of TeacherFeatures."
                )
        num_tokens = self._select(student).shape[1]
        if num_tokens < self.min_tokens:
            raise ValueError(
                f"{name} needs at least {self.min_tokens} tokens per sample, but the student has {num_tokens}: use a "
                "larger token grid."
            )
        if target is None:
            if self.needs_target:
                raise ValueError(f"{name} compares the student with a target, but got none: set the term's target.")
            return
        if student.tokens.shape[0] != target.tokens.shape[0]:
            raise ValueError(
                f"{name} needs student and target of the same batch, but their batch sizes are "
                f"{student.tokens.shape[0]} and {target.tokens.shape[0]}."
            )
        if student.tokens.device != target.tokens.device:
            raise ValueError(
                f"{name} needs student and target on one device, but they are on {student.tokens.device} and "
                f"{target.tokens.device}: move the teacher to the student's device."
            )
        if tuple(student.grid) != tuple(target.grid):
            grids = [f"{rows} x {columns}" for rows, columns in (student.grid, target.grid)]
            raise ConfigurationError(
                f"{name} compares token by token, but the student's grid is {grids[0]} and the target's {grids[1]}: "
                "set the teacher's `grid` to the student's, or the term's `resample` to 'area' or 'bilinear'."
            )
        if self.include_prefix_tokens and student.num_prefix_tokens != target.num_prefix_tokens:
            raise ConfigurationError(
                f"{name} compares token by token, but there are {student.num_prefix_tokens} prefix tokens of the "
                f"student and {target.num_prefix_tokens} of the target: set `num_prefix_tokens` of the "
                "AlignedDenoiser, or include_prefix_tokens=False in the objective."
            )
        if self.needs_equal_width and student.dim != target.dim:
            raise ValueError(
                f"{name} needs tokens of equal width, but the student's are {student.dim} wide and the target's "
                f"{target.dim}: use a projector with out_dim={target.dim}."
            )

    def _select(self, token_map: TokenMap) -> torch.Tensor:
        return token_map.tokens if self.include_prefix_tokens else token_map.patch_tokens


def check_number(objective: AlignmentObjective, name: str, low: float, open_end: bool = False) -> None:
    """Raise `ConfigurationError` unless the argument `name` is a finite number of at least (or above) `low`."""
    value: Any = getattr(objective, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < low or (open_end and value == low):
        bound = f"above {low:g}" if open_end else f"of at least {low:g}"
        raise ConfigurationError(
            f"{name} of {type(objective).__name__} is {value!r}, but must be a finite number {bound}."
        )
