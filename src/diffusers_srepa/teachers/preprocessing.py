"""From images in [0, 1] to what a teacher was trained on: checks, resize, normalisation."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch.nn import functional as F

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.teachers.families import Statistics, TeacherFamily
from diffusers_srepa.teachers.source import TeacherSource


logger = logging.getLogger(__name__)

PROCESSOR_FILE = "preprocessor_config.json"
JOINT_PROCESSOR_FILE = "processor_config.json"

# Room for rounding in half precision, not for images in another range.
RANGE_TOLERANCE = 0.01


def check_images(images: torch.Tensor, grid: tuple[int, int]) -> None:
    """Raise `ValueError` for anything but a float batch `(B, 3, H, W)` with the aspect ratio of `grid`."""
    if not isinstance(images, torch.Tensor):
        raise ValueError(
            f"a teacher takes a float tensor of images (B, 3, H, W) in [0, 1], but got {type(images).__name__}."
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (B, 3, H, W), but have shape {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ValueError(
            f"images must be float in [0, 1], but have dtype {images.dtype}: convert with images.float() / 255."
        )
    if images.numel() == 0:
        raise ValueError(f"images must not be empty, but have shape {tuple(images.shape)}: give at least one.")
    height, width = images.shape[2:]
    if height * grid[1] != width * grid[0]:
        raise ValueError(
            f"images of {height} x {width} pixels have another aspect ratio than the teacher's grid of {grid[0]} x "
            f"{grid[1]} tokens: crop the images or choose a grid of their shape."
        )


def check_range(images: torch.Tensor) -> None:
    """Raise `ValueError` for a value outside [0, 1] by more than 0.01, or NaN; it waits for the device."""
    if images.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(images))
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"images must lie in [0, 1], but range from {low:.4g} to {high:.4g}: map [-1, 1] by (x + 1) / 2, divide "
            f"[0, 255] by 255, and clamp what a resize overshoots."
        )


def resize_images(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize, neither antialiased nor clamped, as REPA and iREPA do it; the same size is left alone."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=False)


def normalize_images(images: torch.Tensor, mean: Statistics, std: Statistics) -> torch.Tensor:
    """`(x - mean) / std` per channel for images `(B, 3, H, W)`."""
    # Python numbers instead of buffers: casting the teacher to half precision must not round them.
    channels = [(images[:, channel] - mean[channel]) / std[channel] for channel in range(3)]
    return torch.stack(channels, dim=1)


def load_statistics(source: TeacherSource, family: TeacherFamily) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation from the repository's image processor, or the row's where there is none.

    Only the JSON file is read: building the processor would need torchvision for some families.
    """
    processor = _read_processor(source)
    if processor is None:
        where = "in the cache of" if source.is_offline else "in"
        logger.warning(
            f"no image processor ({PROCESSOR_FILE}) is {where} {source.name_or_path!r}: images are normalised with "
            f"mean {family.image_mean} and std {family.image_std} of {family.model_type!r}."
        )
        return family.image_mean, family.image_std
    name_or_path = source.name_or_path
    if not processor.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    else:
        mean = check_statistics(processor.get("image_mean", family.image_mean), "image_mean", name_or_path)
        std = check_statistics(processor.get("image_std", family.image_std), "image_std", name_or_path)
    # The processor's pixels are bytes times this factor, ours are bytes / 255: fold the ratio into mean and std.
    factor = (processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ConfigurationError(
            f"rescale_factor of {name_or_path!r} is {factor!r}, but must be a positive number: repair "
            f"{PROCESSOR_FILE}, or give `image_mean` and `image_std`."
        )
    scale = 255 * factor
    if math.isclose(scale, 1.0, rel_tol=1e-3):
        return mean, std
    return _divide(mean, scale), _divide(std, scale)


def _read_processor(source: TeacherSource) -> dict[str, Any] | None:
    """The values of the image processor: a file of their own, or an entry of the file of all processors."""
    path = source.find_file(JOINT_PROCESSOR_FILE)
    joint = {} if path is None else source.read_json(path)
    if isinstance(joint.get("image_processor"), dict):
        return joint["image_processor"]
    path = source.find_file(PROCESSOR_FILE)
    return None if path is None else source.read_json(path)


def check_statistics(values: Any, key: str, origin: str) -> Statistics:
    """Three finite numbers (a standard deviation not zero), or one sentence."""
    numbers = [values] * 3 if isinstance(values, (int, float)) else values
    try:
        red, green, blue = (float(number) for number in numbers)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"{key} of {origin!r} must be three numbers, but is {values!r}: give `image_mean` and `image_std`."
        ) from None
    usable = all(math.isfinite(number) and (number > 0 or key != "image_std") for number in (red, green, blue))
    if not usable:
        raise ConfigurationError(
            f"{key} of {origin!r} is {values!r}, with which no image can be normalised: give `image_mean` and "
            "`image_std`."
        )
    return red, green, blue


def _divide(values: Statistics, scale: float) -> Statistics:
    return values[0] / scale, values[1] / scale, values[2] / scale
