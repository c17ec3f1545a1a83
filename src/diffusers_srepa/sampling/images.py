"""Images of given classes from a pipeline, each from a seed of its own, and the folder they are written to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from diffusers_srepa.errors import ConfigurationError


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn.

    Args:
        num_inference_steps: Model calls per image.
        guidance_scale: Classifier-free guidance weight; 1 switches it off.
        guidance_interval: Times t between which guidance acts, 1 = noise.
        seed: Seed of the first image; image i comes from `seed + i` alone, whatever the batch size.
        batch_size: Images drawn at a time.
    """

    num_inference_steps: int = 250
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    batch_size: int = 16


def check_sampling(pipeline: Any, class_labels: Sequence[int | str], settings: SamplingSettings) -> None:
    """Refuse settings with which the pipeline could not sample, and classes that it does not have.

    Raises:
        ConfigurationError: steps or guidance that scheduler or transformer cannot do, an unknown name, or a number
            outside the classes.
    """
    try:
        pipeline.check_components()
        pipeline.check_guidance(
            settings.guidance_scale, settings.guidance_interval, pipeline.config.guidance_channels, 0.0
        )
        type(pipeline.scheduler).from_config(pipeline.scheduler.config).set_timesteps(settings.num_inference_steps)
    except ValueError as error:
        raise ConfigurationError(f"`settings` cannot be used: {error}") from None
    num_classes = pipeline.transformer.config.num_classes
    for label in class_labels:
        if isinstance(label, str):
            try:
                pipeline.get_label_ids(label)
            except ValueError as error:
                raise ConfigurationError(f"`class_labels` cannot be used: {error}") from None
        elif not 0 <= label < num_classes:
            raise ConfigurationError(f"`class_labels` holds {label}, but the classes are 0 to {num_classes - 1}.")


def sample_images(
    pipeline: Any,
    class_labels: Sequence[int | str],
    settings: SamplingSettings,
    is_given_up: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One image per label; if `is_given_up` says so after a model call, only those of batches that are whole."""

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = is_given_up()
        return tensors

    images: list[Image.Image] = []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(class_labels), settings.batch_size):
        chosen = list(class_labels[start : start + settings.batch_size])
        seeds = range(settings.seed + start, settings.seed + start + len(chosen))
        output = pipeline(
            class_labels=chosen,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=look,
        )
        if is_given_up():
            break
        images += output.images
    return images


def write_images(
    folder: Path,
    pipeline: Any,
    images: Sequence[Image.Image],
    class_labels: Sequence[int | str],
    settings: SamplingSettings,
) -> Image.Image:
    """Write every image as PNG, their grid as `grid.png`, and how to make them again as `settings.json`; the grid."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for index, (image, label) in enumerate(zip(images, class_labels, strict=True)):
        name = f"{index:04d}.png"
        image.save(folder / name)
        records.append({"file": name, "class_label": label, "seed": settings.seed + index})
    document = {name: value for name, value in asdict(settings).items() if name not in ("seed", "batch_size")}
    document |= {
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "images": records,
    }
    (folder / "settings.json").write_text(json.dumps(document, indent=1))
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = Image.new("RGB", images[0].size, "white")
    grid = make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows, columns)
    grid.save(folder / "grid.png")
    return grid
