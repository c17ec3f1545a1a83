"""`diffusers-srepa sample`: draw images of given classes from a pipeline or a checkpoint."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers_srepa.configuration.command_line import parse_config
from diffusers_srepa.configuration.options import Options, option, options_of
from diffusers_srepa.errors import ConfigurationError, in_options, one_line
from diffusers_srepa.files import check_output_place


DESCRIPTION = "Draw images of the given classes; image i comes from seed + i alone."
SETTINGS_FILE = "settings.json"
SETTINGS_KEYS = {"num_inference_steps", "guidance_scale", "scheduler", "images"}


@dataclass
class SampleOptions(Options):
    """What is drawn, from what, and how."""

    model: str = option(
        help="Pipeline (folder or Hub id), or folder checkpoint-N of a run.", also=("pretrained_model_name_or_path",)
    )
    output_dir: str = option(help="Folder of the images and their grid; empty, or see overwrite.")
    class_labels: list[str | int] | None = option(None, "Classes by name or number; by default every class once.")
    images_per_class: int = option(1, "Images per class.", minimum=1)
    num_inference_steps: int = option(250, "Model calls per image.", minimum=1)
    guidance_scale: float = option(1.0, "Classifier-free guidance weight; 1 switches it off.", minimum=0)
    # What the generators of torch take.
    seed: int = option(0, "Seed of the first image.", minimum=0, below=2**63)
    batch_size: int = option(16, "Images sampled at a time.", minimum=1)
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision.", also=("mixed_precision",))
    device: str | None = option(None, "Device; by default the first accelerator, else the CPU.")
    revision: str | None = option(None, "Revision of the pipeline's repository.")
    overwrite: bool = option(False, "Replace the images of an earlier call.")


def run(argv: Sequence[str], prog: str) -> None:
    """Draw the images and write them."""
    options = parse_config(argv, SampleOptions, prog, DESCRIPTION)
    output_dir = Path(options.output_dir)
    stale = find_stale_files(output_dir, options.overwrite)

    from diffusers_srepa.sampling.images import SamplingSettings, check_sampling, sample_images, write_images

    pipeline = load_pipeline(options)
    labels = [label for label in choose_labels(options, pipeline) for _ in range(options.images_per_class)]
    shared = ("num_inference_steps", "guidance_scale", "seed", "batch_size")
    settings = SamplingSettings(**{name: getattr(options, name) for name in shared})
    names = {name: f"--{name}" for name in options_of(SampleOptions)}
    with in_options(names | {"settings": "--num_inference_steps or --guidance_scale"}):
        check_sampling(pipeline, labels, settings)
        images = sample_images(pipeline, labels, settings)
    for file in stale:
        file.unlink()
    write_images(output_dir, pipeline, images, labels, settings)
    sys.stdout.write(f"{len(images)} images and grid.png are in {output_dir}\n")


def find_stale_files(folder: Path, overwrite: bool) -> list[Path]:
    """The files of an earlier call in `folder`, which go when new ones are written; other files are refused."""
    with in_options({"output_dir": "--output_dir"}):
        check_output_place(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file: set --output_dir to a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return []
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text())
        names = [image["file"] for image in settings["images"]] if settings.keys() >= SETTINGS_KEYS else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        names = None
    if names is None:
        raise ConfigurationError(f"the folder {folder} is not empty and holds no earlier images: change --output_dir.")
    if not overwrite:
        raise ConfigurationError(
            f"the folder {folder} holds earlier images: replace them by --overwrite, or change --output_dir."
        )
    images = [folder / name for name in names if re.fullmatch(r"\d{4,}\.png", str(name))]
    return [file for file in (*images, folder / "grid.png", folder / SETTINGS_FILE) if file.is_file()]


def load_pipeline(options: SampleOptions) -> Any:
    """The `SiTPipeline` on its device."""
    import torch

    from diffusers_srepa.pipelines.hub import SiTPipeline

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device {device} cannot be used ({str(error).splitlines()[0]}).") from None
    try:
        return SiTPipeline.from_pretrained(
            options.model, revision=options.revision, dtype=getattr(torch, options.dtype)
        ).to(device)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"no pipeline can be loaded from {options.model} ({one_line(error, 500)}): set --model to a folder that "
            "holds a model_index.json, or to a Hub id."
        ) from None


def choose_labels(options: SampleOptions, pipeline: Any) -> list[str | int]:
    """The classes, each by name where there is one of that name, so that one called "10" can be asked for, else by
    number.
    """
    if options.class_labels is None:
        return list(range(pipeline.transformer.config.num_classes))
    names = set((pipeline.config.id2label or {}).values())
    return [
        int(label) if isinstance(label, str) and label.isdigit() and label not in names else label
        for label in options.class_labels
    ]
