"""The options of `diffusers-srepa convert`, and what they do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from diffusers_srepa.conversion.convert import Conversion

HELP = "turn an official SiT, REPA, iREPA or REG checkpoint into a pipeline, or a pipeline into a REPA state dict"
DESCRIPTION = (
    "Convert a checkpoint file of SiT, REPA, iREPA or REG to a folder that SiTPipeline.from_pretrained loads. Format "
    "and sizes are read off the file. With --to repa the other way round: a pipeline becomes a state dict for the "
    "official code."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint file; with --to repa a pipeline (folder, Hub id)"
    )
    parser.add_argument(
        "--output_dir", required=True, type=Path, help="folder to write; with --to repa it gets checkpoint.pt"
    )
    parser.add_argument("--to", choices=("pipeline", "repa"), default="pipeline", help="what to make of it")
    parser.add_argument("--vae", help="autoencoder (folder or Hub id), or pixels for a model of pixels")
    parser.add_argument("--vae_subfolder", help="folder of the autoencoder inside its repository")
    parser.add_argument("--vae_revision", help="revision of the autoencoder's repository")
    parser.add_argument("--weights", choices=("ema", "model"), help="which weights (default: ema where there are any)")
    parser.add_argument(
        "--format", choices=("sit", "repa", "irepa", "reg"), help="format, needed where the file does not show it"
    )
    parser.add_argument(
        "--path_type", choices=("linear", "cosine"), help="path (default: what the file says, else linear)"
    )
    parser.add_argument("--num_attention_heads", type=int, help="heads, for a model that is none of S, B, L and XL")
    parser.add_argument("--num_classes", type=int, help="classes, for a label table without null class")
    parser.add_argument(
        "--sample_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="latent size, if it is no square"
    )
    parser.add_argument(
        "--scheduler", choices=("euler-maruyama", "euler"), default="euler-maruyama", help="sampler of the pipeline"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="precision of the written weights (default: the file's)",
    )
    parser.add_argument(
        "--id2label", help="class names: imagenet, none, or a JSON file (default: imagenet for 1000 classes)"
    )
    parser.add_argument("--projector_names", nargs="+", help="folder names of the projectors (default: default, ...)")
    parser.add_argument("--overwrite", action="store_true", help="replace a pipeline, or a file, that is there")
    parser.add_argument("--push_to_hub", action="store_true", help="upload the pipeline when it is written")
    parser.add_argument("--hub_model_id", help="repository to push to (default: the name of --output_dir)")
    parser.add_argument("--hub_private", action="store_true", help="make a new repository private")


# Options that say nothing about an exported state dict, with their neutral values.
_PIPELINE_OPTIONS = {
    "vae": None,
    "vae_subfolder": None,
    "vae_revision": None,
    "weights": None,
    "format": None,
    "path_type": None,
    "num_attention_heads": None,
    "num_classes": None,
    "sample_size": None,
    "scheduler": "euler-maruyama",
    "id2label": None,
    "projector_names": None,
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_private": False,
}


def run(arguments: argparse.Namespace, claim_repository: Callable[[], str] | None = None) -> Conversion:
    """Convert as the arguments say.

    Args:
        arguments (`argparse.Namespace`): what a parser with [`add_arguments`] returned.
        claim_repository (`Callable[[], str]`, *optional*): with `--push_to_hub`, makes sure that the repository exists
            and may be written to, and returns its id; called after all other checks. Pushing is left to the caller.

    Raises:
        ConfigurationError: input that cannot be converted, in one sentence; nothing has been written then.
    """
    from diffusers_srepa.conversion.convert import convert_checkpoint
    from diffusers_srepa.conversion.export import export_checkpoint
    from diffusers_srepa.conversion.layout import Choices
    from diffusers_srepa.errors import ConfigurationError, in_options

    options = {name: f"--{name}" for name in vars(arguments)}
    options |= {"source": "--checkpoint", "output": "--output_dir", "repo_id": "--hub_model_id"}
    if arguments.to == "repa":
        given = [name for name, value in _PIPELINE_OPTIONS.items() if getattr(arguments, name) != value]
        if given:
            raise ConfigurationError(f"--{given[0]} has no meaning with --to repa: leave it out.")
        with in_options(options):
            return export_checkpoint(
                arguments.checkpoint, arguments.output_dir, dtype=arguments.dtype, overwrite=arguments.overwrite
            )
    for name in ("hub_model_id", "hub_private"):
        if getattr(arguments, name) and not arguments.push_to_hub:
            raise ConfigurationError(f"--{name} needs --push_to_hub: set it too, or leave --{name} out.")
    with in_options(options):
        return convert_checkpoint(
            arguments.checkpoint,
            arguments.output_dir,
            vae=arguments.vae,
            vae_subfolder=arguments.vae_subfolder,
            vae_revision=arguments.vae_revision,
            weights=arguments.weights,
            choices=Choices(
                format=arguments.format,
                path_type=arguments.path_type,
                num_attention_heads=arguments.num_attention_heads,
                num_classes=arguments.num_classes,
                sample_size=None if arguments.sample_size is None else tuple(arguments.sample_size),
            ),
            scheduler=arguments.scheduler,
            dtype=arguments.dtype,
            id2label=arguments.id2label,
            projector_names=arguments.projector_names,
            overwrite=arguments.overwrite,
            claim_repository=claim_repository if arguments.push_to_hub else None,
        )
