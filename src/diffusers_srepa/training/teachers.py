"""The frozen encoders of a run, checked against the student before training starts."""

from __future__ import annotations

from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.configuration.sections import TeacherConfig
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import ConfigurationError, close_matches
from diffusers_srepa.teachers.auto_teacher import Teacher


def teacher_settings(config: TrainingConfig, name: str) -> TeacherConfig:
    """The options of the teacher called `name`, which terms have as their `target`.

    Raises:
        ConfigurationError: there is no such teacher.
    """
    known = {DEFAULT: config.teacher, **config.teachers}
    if name not in known:
        raise ConfigurationError(
            f"an alignment term names the teacher {name!r}, {close_matches(name, known)} (section teachers)."
        )
    return known[name]


def build_teacher(config: TrainingConfig, name: str, student_grid: tuple[int, int]) -> Teacher:
    """The frozen encoder called `name`, its grid checked against the student's.

    Raises:
        ConfigurationError: the grids differ and `resample` is not set, or a class token is needed and missing.
    """
    settings = teacher_settings(config, name)
    section = "teacher" if name == DEFAULT else f"teachers.{name}"
    usual = max(config.data.resolution // 16, 1)
    grid = settings.grid or (max(student_grid[0], usual), max(student_grid[1], usual))
    if tuple(grid) != student_grid and settings.resample is None:
        raise ConfigurationError(
            f"the teacher's grid is {grid[0]} x {grid[1]} tokens, the student's {student_grid[0]} x {student_grid[1]}"
            f": set {section}.grid to the student's, or {section}.resample to area or bilinear."
        )
    teacher = Teacher.from_pretrained(
        settings.name_or_path,
        grid=(grid[0], grid[1]),
        layer=settings.layer,
        subfolder=settings.subfolder,
        revision=settings.revision,
    )
    if name == DEFAULT and config.alignment.class_token_weight is not None and not teacher.has_class_token:
        raise ConfigurationError(
            f"{config.alignment.preset} denoises the teacher's class token, but {settings.name_or_path} has none: "
            "change teacher.name_or_path or alignment.preset."
        )
    return teacher
