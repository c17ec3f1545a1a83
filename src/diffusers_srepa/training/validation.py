"""Sample grids from fixed seeds, with the averaged weights: the same pictures that the finished pipeline gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusers_srepa.configuration.sections import SamplingConfig, ValidationConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.pipelines.pipeline_sit import SiTPipeline


def validation_labels(config: ValidationConfig, num_classes: int) -> list[int | str]:
    """The classes of the validation images, in order: the configured ones, else the classes in turn."""
    if config.class_labels is not None:
        return list(config.class_labels)
    return [index % num_classes for index in range(config.num_images)]


def check_sampling(pipeline: SiTPipeline, sampling: SamplingConfig) -> None:
    """Refuse settings with which the pipeline could not sample.

    Raises:
        ConfigurationError: steps or guidance that scheduler or transformer cannot do.
    """
    try:
        pipeline.check_components()
        pipeline.check_guidance(sampling.guidance_scale, sampling.guidance_interval, sampling.guidance_channels, 0.0)
        type(pipeline.scheduler).from_config(pipeline.scheduler.config).set_timesteps(sampling.num_inference_steps)
    except ValueError as error:
        raise ConfigurationError(f"section sampling cannot be used: {error}") from None


def check_labels(pipeline: SiTPipeline, labels: Sequence[int | str]) -> None:
    """Refuse classes that the pipeline does not have.

    Raises:
        ConfigurationError: an unknown name, or a number outside the classes.
    """
    num_classes = pipeline.transformer.config.num_classes
    for label in labels:
        if isinstance(label, str):
            try:
                pipeline.get_label_ids(label)
            except ValueError as error:
                raise ConfigurationError(f"validation.class_labels cannot be used: {error}") from None
        elif not 0 <= label < num_classes:
            raise ConfigurationError(
                f"validation.class_labels holds {label}, but the classes are 0 to {num_classes - 1}."
            )


def sample_images(
    pipeline: SiTPipeline,
    labels: Sequence[int | str],
    validation: ValidationConfig,
    sampling: SamplingConfig,
    is_given_up: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One image per label; image i comes from a CPU generator with seed `validation.seed + i` alone.

    Args:
        pipeline (`SiTPipeline`): samples with the weights that its transformer has.
        labels (`Sequence[int | str]`): classes of the images.
        validation (`ValidationConfig`): seeds and batch size.
        sampling (`SamplingConfig`): the sampler's settings.
        is_given_up (`Callable`): tells after every model call whether to leave off with the batches that are whole.
    """

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = is_given_up()
        return tensors

    images: list[Image.Image] = []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(labels), validation.batch_size):
        chosen = list(labels[start : start + validation.batch_size])
        seeds = range(validation.seed + start, validation.seed + start + len(chosen))
        output = pipeline(
            class_labels=chosen,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_interval=sampling.guidance_interval,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=look,
        )
        if is_given_up():
            break
        images += output.images
    return images


def write_validation(
    folder: Path,
    pipeline: SiTPipeline,
    images: Sequence[Image.Image],
    labels: Sequence[int | str],
    validation: ValidationConfig,
    sampling: SamplingConfig,
) -> Image.Image:
    """Write every image, their grid and how to make them again.

    Returns:
        `PIL.Image.Image`: the grid, also written as `grid.png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{index:04d}.png"
        image.save(folder / name)
        records.append({"file": name, "class_label": label, "seed": validation.seed + index})
    settings = {
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "guidance_interval": list(sampling.guidance_interval),
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "images": records,
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    grid = image_grid(images)
    grid.save(folder / "grid.png")
    return grid


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size in rows, a square grid unless `columns` is given, one pixel apart."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    grid = Image.new("RGB", (columns * (width + 1) - 1, rows * (height + 1) - 1), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * (width + 1), row * (height + 1)))
    return grid
