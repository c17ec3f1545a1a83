"""Loading the vision tower of a checkpoint with every weight accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.teachers.families import TeacherFamily
from diffusers_srepa.teachers.source import TeacherSource


LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UnpicklingError)
# Parameters that no forward of a teacher reads.
UNUSED_WEIGHTS = ("mask_token", "pooler.dense.weight", "pooler.dense.bias")


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
