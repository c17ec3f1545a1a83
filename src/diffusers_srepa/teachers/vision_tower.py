"""The vision tower of a checkpoint: what its config says, and loading it with every weight accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.hub_errors import FETCH_ERRORS
from diffusers_srepa.teachers.families import TeacherFamily
from diffusers_srepa.teachers.source import TeacherSource
from diffusers_srepa.tokens import Grid


LOAD_ERRORS = (*FETCH_ERRORS, RuntimeError, KeyError, SafetensorError, UnpicklingError)
# Parameters that no forward of a teacher reads.
UNUSED_WEIGHTS = ("mask_token", "pooler.dense.weight", "pooler.dense.bias")


@dataclass(frozen=True)
class TowerGeometry:
    """The numbers of a vision tower that the token rules need."""

    patch_size: int
    feature_dim: int
    num_layers: int
    num_register_tokens: int
    native_grid: Grid | None


def read_geometry(config: Any, name_or_path: str) -> TowerGeometry:
    """Read a config of `transformers`; a dual encoder's `vision_config` is used where there is one.

    A `ConfigurationError` says what is not that of a vision transformer on three-channel images with square patches.
    """
    vision = getattr(config, "vision_config", None) or config
    model_type = getattr(config, "model_type", None)
    wanted = ("patch_size", "hidden_size", "num_hidden_layers")
    missing = [key for key in wanted if getattr(vision, key, None) is None]
    if missing:
        raise ConfigurationError(
            f"the teacher {name_or_path!r} of type {model_type!r} is not a vision transformer that this package can "
            f"read (its config has no {missing[0]}): change `name_or_path` to one of the families in docs/teachers.md."
        )
    if getattr(vision, "num_channels", 3) != 3:
        raise ConfigurationError(
            f"the teacher {name_or_path!r} takes {vision.num_channels} channels, but images have 3: change "
            "`name_or_path`."
        )
    patch_size = _square(vision.patch_size, name_or_path)
    return TowerGeometry(
        patch_size=patch_size,
        feature_dim=int(vision.hidden_size),
        num_layers=int(vision.num_hidden_layers),
        num_register_tokens=int(getattr(vision, "num_register_tokens", 0) or 0),
        native_grid=_native_grid(vision, patch_size),
    )


def _square(patch_size: Any, name_or_path: str) -> int:
    sides = set(patch_size) if isinstance(patch_size, Sequence) else {patch_size}
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides) or not sides:
        raise ConfigurationError(
            f"the config of the teacher {name_or_path!r} says patch_size {patch_size!r}, but patches have a positive "
            f"number of pixels: change `name_or_path`."
        )
    if len(sides) != 1:
        raise ConfigurationError(
            f"the teacher {name_or_path!r} has patches of {tuple(patch_size)} pixels, but they must be square: change "
            f"`name_or_path`."
        )
    return int(sides.pop())


def _native_grid(vision: Any, patch_size: int) -> Grid | None:
    image_size = getattr(vision, "image_size", None)
    if image_size is None:
        num_patches = getattr(vision, "num_patches", None)
        side = math.isqrt(num_patches) if num_patches else 0
        return (side, side) if side else None
    height, width = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    return height // patch_size, width // patch_size


def load_config(source: TeacherSource) -> Any:
    """The config object of a repository, without running code that comes with it."""
    try:
        return transformers.AutoConfig.from_pretrained(
            source.name_or_path, trust_remote_code=False, **source.hub_arguments
        )
    except Exception as error:  # a config with values that make no sense fails in as many ways as there are keys
        raise source.failure(error) from error


def load_tower(source: TeacherSource, family: TeacherFamily, dtype: torch.dtype) -> nn.Module:
    """Load the vision tower of `source` with weights of `dtype`."""
    arguments = {"dtype": dtype, "output_loading_info": True} | source.hub_arguments | dict(family.class_arguments)
    if family.vision_class is None:
        arguments["trust_remote_code"] = False
    try:
        with quiet_transformers():
            vision_class = getattr(transformers, family.vision_class or "AutoModel")
            model, report = vision_class.from_pretrained(source.name_or_path, **arguments)
    except LOAD_ERRORS as error:
        raise source.failure(error) from error
    check_complete(report, source.name_or_path)
    for key, value in family.config_overrides.items():
        setattr(model.config, key, value)
    # A dual encoder of a type that the table does not know: its image half.
    return getattr(model, "vision_model", model) if family.vision_class is None else model


def check_complete(report: dict[str, Any], name_or_path: str) -> None:
    """Refuse a tower of which some weights that the forward needs stayed random: `transformers` only warns."""
    missing = sorted(key for key in report["missing_keys"] if not key.endswith(UNUSED_WEIGHTS))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigurationError(
            f"the checkpoint of the teacher {name_or_path!r} lacks {missing[0]}{more}: a teacher with random weights "
            f"is of no use, change `name_or_path` to a complete one."
        )


def find_blocks(tower: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of transformer blocks of `tower`: its first `ModuleList` of `num_layers` entries.

    Found by structure because its name differs between families and between versions of `transformers`.
    """
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ConfigurationError(
        f"{type(tower).__name__} has no list of {num_layers} blocks to tap: leave `layer` unset for this teacher."
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the report of skipped weights (text towers, decoders): what matters is checked by `check_complete`."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
