"""The command `diffusers-srepa`: parse and call. Every subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; wrong input ends in one sentence and exit code 2.

    Args:
        argv (`Sequence[str]`, *optional*): arguments without the program's name; by default the process's own.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {in_own_options(' '.join(str(error).split()), arguments)}\n")
        return 2
    return 0


def in_own_options(message: str, arguments: argparse.Namespace) -> str:
    """A message with the options of a training run, which the library names, in those of the subcommand."""
    renamed = {f"latents.{name}": f"--vae_{name}" for name in ("subfolder", "revision", "dtype")}
    renamed |= {"latents.vae": "--vae", "validation.class_labels": "--class_labels"}
    renamed |= {f"data.{name}": f"--{name}" for name in vars(arguments)}
    return re.sub(
        r"(?<![\w./-])(?:latents|data|validation)\.\w+(?![\w./-]\w)",
        lambda found: renamed.get(found[0], found[0]),
        message,
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="diffusers-srepa", description="Tools around SiT training with representation alignment."
    )
    subcommands = parser.add_subparsers(required=True, metavar="command")
    _add_cache_latents(subcommands)
    _add_sample(subcommands)
    _add_convert(subcommands)
    return parser


def _add_cache_latents(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "cache-latents",
        help="encode a dataset once, for training with --data.latent_cache",
        description="Encode every image of a dataset and store mean and standard deviation of its latents. A stopped "
        "run continues where it was; under `accelerate launch -m diffusers_srepa.cli` the processes share the work.",
    )
    parser.add_argument("--dataset", required=True, help="dataset of the Hub, or a local folder")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the cache")
    parser.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="autoencoder (folder or Hub id)")
    parser.add_argument("--vae_subfolder", help="folder of the autoencoder inside its repository")
    parser.add_argument("--vae_revision", help="revision of the autoencoder's repository")
    parser.add_argument(
        "--vae_dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the autoencoder, the training's latents.dtype (default: float32)",
    )
    parser.add_argument("--resolution", type=int, default=256, help="side of the square images (default: 256)")
    parser.add_argument("--flip", action="store_true", help="also store the latents of the flipped images")
    parser.add_argument("--split", default="train", help="split of the dataset (default: train)")
    parser.add_argument("--name", help="configuration of the dataset")
    parser.add_argument("--revision", help="revision of the dataset's repository")
    parser.add_argument("--data_dir", help="folder inside the dataset's repository")
    parser.add_argument("--image_column", help="column of the images")
    parser.add_argument("--label_column", help="column of the labels")
    parser.add_argument("--cache_dir", help="folder for downloads")
    parser.add_argument("--on_bad_image", choices=("skip", "raise"), default="skip", help="unreadable images")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="precision of the cache")
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded at a time (default: 32)")
    parser.add_argument("--num_workers", type=int, default=4, help="loader processes (default: 4)")
    parser.set_defaults(run=_cache_latents)


def _cache_latents(arguments: argparse.Namespace) -> None:
    import torch
    from accelerate import PartialState

    from diffusers_srepa.data.datasets import load_image_dataset
    from diffusers_srepa.data.image_dataset import ImageDataset
    from diffusers_srepa.data.latent_cache.write import cache_latents
    from diffusers_srepa.errors import in_options
    from diffusers_srepa.latents.loading import load_latent_space

    state = PartialState()
    with in_options({"name_or_path": "--vae", "subfolder": "--vae_subfolder"}):
        latent_space = load_latent_space(
            arguments.vae,
            subfolder=arguments.vae_subfolder,
            revision=arguments.vae_revision,
            dtype=getattr(torch, arguments.vae_dtype),
        )
    with in_options({"name_or_path": "--dataset"} | {name: f"--{name}" for name in vars(arguments)}):
        with state.main_process_first():
            dataset = load_image_dataset(
                arguments.dataset,
                name=arguments.name,
                split=arguments.split,
                revision=arguments.revision,
                data_dir=arguments.data_dir,
                image_column=arguments.image_column,
                label_column=arguments.label_column,
                resolution=arguments.resolution,
                on_bad_image=arguments.on_bad_image,
                cache_dir=arguments.cache_dir,
            )
        assert isinstance(dataset, ImageDataset), "a dataset that is not streamed has rows by number"
        cache_latents(
            dataset,
            latent_space,
            arguments.output_dir,
            flip=arguments.flip,
            dtype=arguments.dtype,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            process_index=state.process_index,
            num_processes=state.num_processes,
            device=state.device,
            show_progress=state.is_main_process,
        )


def _add_sample(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "sample",
        help="draw images from a trained pipeline",
        description="Draw images of the given classes; image i comes from seed + i alone.",
    )
    parser.add_argument("--model", required=True, help="pipeline (folder or Hub id)")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the images and their grid")
    parser.add_argument("--class_labels", nargs="+", help="classes by name or number; by default every class once")
    parser.add_argument("--images_per_class", type=int, default=1, help="images per class (default: 1)")
    parser.add_argument("--num_inference_steps", type=int, default=250, help="model calls per image (default: 250)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="guidance weight; 1 is off (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument("--batch_size", type=int, default=16, help="images sampled at a time (default: 16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision")
    parser.add_argument("--device", help="device; by default the first accelerator, else the CPU")
    parser.add_argument("--revision", help="revision of the pipeline's repository")
    parser.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> None:
    import torch

    from diffusers_srepa.configuration.sections import SamplingConfig, ValidationConfig
    from diffusers_srepa.errors import ConfigurationError
    from diffusers_srepa.pipelines.hub import SiTPipeline
    from diffusers_srepa.training.validation import check_labels, sample_images, write_validation

    for name in ("images_per_class", "batch_size", "num_inference_steps"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"--{name} is {getattr(arguments, name)}, but must be at least 1.")
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ConfigurationError(f"{arguments.output_dir} is a file: set --output_dir to a folder.")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device {device} cannot be used ({str(error).splitlines()[0]}).") from None
    try:
        pipeline = SiTPipeline.from_pretrained(
            arguments.model, revision=arguments.revision, dtype=getattr(torch, arguments.dtype)
        ).to(device)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigurationError(
            f"no pipeline can be loaded from {arguments.model} ({reason}): set --model to a folder that holds a "
            "model_index.json, or to a Hub id."
        ) from None
    num_classes = pipeline.transformer.config.num_classes
    classes = arguments.class_labels or list(range(num_classes))
    labels = [
        _as_label(label, pipeline.config.id2label or {})
        for label in classes
        for _ in range(arguments.images_per_class)
    ]
    check_labels(pipeline, labels)
    validation = ValidationConfig(seed=arguments.seed, batch_size=arguments.batch_size)
    sampling = SamplingConfig(
        num_inference_steps=arguments.num_inference_steps, guidance_scale=arguments.guidance_scale
    )
    images = sample_images(pipeline, labels, validation, sampling)
    write_validation(arguments.output_dir, pipeline, images, labels, validation, sampling)
    sys.stdout.write(f"{len(images)} images and grid.png are in {arguments.output_dir}\n")


def _add_convert(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    # Imports neither torch nor diffusers.
    from diffusers_srepa.conversion import command

    parser = subcommands.add_parser("convert", help=command.HELP, description=command.DESCRIPTION)
    command.add_arguments(parser)
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from diffusers_srepa.conversion import command
    from diffusers_srepa.errors import in_options
    from diffusers_srepa.publishing import hub

    def claim_repository() -> str:
        name = arguments.hub_model_id or arguments.output_dir.resolve().name
        return hub.create_repository(name, private=arguments.hub_private or None)

    result = command.run(arguments, claim_repository)
    sys.stdout.write(f"{result.summary}\n" + "".join(f"note: {note}\n" for note in result.notes))
    sys.stdout.write(f"written to {result.path}\n")
    if result.repository is not None:
        with in_options({"repo_id": "--hub_model_id"}):
            url = hub.push_folder(result.path, result.repository, commit_message="Upload converted SiTPipeline")
        sys.stdout.write(f"pushed to {url}\n")


def _as_label(label: str | int, id2label: Mapping[str, str]) -> str | int:
    """A class name where there is one of that name, so that a class called "10" can be asked for, else a number."""
    if isinstance(label, int) or label in id2label.values() or not label.isdigit():
        return label
    return int(label)


if __name__ == "__main__":
    sys.exit(main())
