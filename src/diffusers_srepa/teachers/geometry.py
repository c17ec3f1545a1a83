"""What a vision config says about patches, widths and the grid of its position table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.tokens import Grid


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
