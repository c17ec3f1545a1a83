"""`diffusers-srepa convert`: an official checkpoint becomes a pipeline, or a pipeline a state dict of REPA."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffusers_srepa.configuration.command_line import parse_config
from diffusers_srepa.configuration.options import Options, option, options_of, walk
from diffusers_srepa.errors import ConfigurationError, in_options
from diffusers_srepa.schedulers.registry import SCHEDULER_TITLES


if TYPE_CHECKING:
    from diffusers_srepa.conversion.convert import Conversion

DESCRIPTION = (
    "Convert a checkpoint file of SiT, REPA, iREPA or REG to a folder that SiTPipeline.from_pretrained loads. Format "
    "and sizes are read off the file. With --to repa the other way round: a pipeline or a training checkpoint becomes "
    "a state dict for the official code."
)


@dataclass
class ConvertOptions(Options):
    """What is converted, to what, and what the file does not say."""

    checkpoint: str = option(
        help="Checkpoint file; with --to repa a pipeline (folder, Hub id) or folder checkpoint-N of a run."
    )
    output_dir: str = option(help="Folder to write; with --to repa it gets checkpoint.pt.")
    to: Literal["pipeline", "repa"] = option("pipeline", "What to make of it.")
    vae: str | None = option(None, "Autoencoder (folder or Hub id), or pixels for a model of pixels.")
    vae_subfolder: str | None = option(None, "Folder of the autoencoder inside its repository.")
    vae_revision: str | None = option(None, "Revision of the autoencoder's repository.")
    weights: Literal["ema", "model"] | None = option(None, "Which weights; by default ema where there are any.")
    format: Literal["sit", "repa", "irepa", "reg"] | None = option(
        None, "Format, needed where the file does not show it."
    )
    path_type: Literal["linear", "cosine"] | None = option(None, "Path; by default what the file says, else linear.")
    num_attention_heads: int | None = option(None, "Heads, for a model that is none of S, B, L and XL.")
    num_classes: int | None = option(None, "Classes, for a label table without null class.")
    sample_size: tuple[int, int] | None = option(None, "Height and width of the latents, if they are no square.")
    scheduler: str = option("euler-maruyama", "Sampler of the pipeline.", choices=tuple(SCHEDULER_TITLES))
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = option(
        None, "Precision of the written weights; by default the file's."
    )
    id2label: str | None = option(
        None, "Class names: imagenet, none, or a JSON file; by default imagenet for 1000 classes."
    )
    projector_names: list[str] | None = option(
        None, "Folder names of the projectors; by default default, projector_1, ..."
    )
    overwrite: bool = option(False, "Replace a pipeline, or a file, that is there.")
    push_to_hub: bool = option(False, "Upload the pipeline when it is written.")
    hub_model_id: str | None = option(None, "Repository to push to; by default the name of --output_dir.")
    hub_private: bool = option(False, "Make a new repository private.")


# All others say nothing about an exported state dict.
_EXPORT_OPTIONS = ("checkpoint", "output_dir", "to", "dtype", "overwrite")
# All others are arguments of `convert_checkpoint`, or fields of its `choices`.
_CALLERS_OPTIONS = ("to", "push_to_hub", "hub_model_id", "hub_private")
_OPTION_NAMES = {name: f"--{name}" for name in options_of(ConvertOptions)} | {
    "source": "--checkpoint",
    "output": "--output_dir",
    "repo_id": "--hub_model_id",
}


def run(argv: Sequence[str], prog: str) -> None:
    """Convert, and push."""
    options = parse_config(argv, ConvertOptions, prog, DESCRIPTION)

    from diffusers_srepa.publishing.hub import create_repository, push_folder

    def claim_repository() -> str:
        name = options.hub_model_id or Path(options.output_dir).resolve().name
        return create_repository(name, private=options.hub_private or None)

    with in_options(_OPTION_NAMES):
        result = convert(options, claim_repository)
        sys.stdout.write(f"{result.summary}\n" + "".join(f"note: {note}\n" for note in result.notes))
        sys.stdout.write(f"written to {result.path}\n")
        if result.repository is not None:
            message = "Upload converted SiTPipeline"
            url = push_folder(result.path, result.repository, commit_message=message, parts=result.parts)
            sys.stdout.write(f"pushed to {url}\n")


def convert(options: ConvertOptions, claim_repository: Callable[[], str] | None = None) -> Conversion:
    """Convert as the options say; pushing is left to the caller.

    With `push_to_hub`, `claim_repository` makes sure that the repository may be written to, and returns its id; it is
    called after all other checks.
    """
    from diffusers_srepa.conversion.convert import convert_checkpoint
    from diffusers_srepa.conversion.export import export_checkpoint
    from diffusers_srepa.conversion.layout import Choices

    if options.to == "repa":
        for name, declared, value in walk(options):
            if name not in _EXPORT_OPTIONS and value != declared.default:
                raise ConfigurationError(f"--{name} has no meaning with --to repa: leave it out.")
        with in_options(_OPTION_NAMES):
            return export_checkpoint(
                options.checkpoint, options.output_dir, dtype=options.dtype, overwrite=options.overwrite
            )
    for name in ("hub_model_id", "hub_private"):
        if getattr(options, name) and not options.push_to_hub:
            raise ConfigurationError(f"--{name} needs --push_to_hub: set it too, or leave --{name} out.")
    values = {name: value for name, value in vars(options).items() if name not in _CALLERS_OPTIONS}
    choices = Choices(**{field.name: values.pop(field.name) for field in fields(Choices)})
    claim_repository = claim_repository if options.push_to_hub else None
    with in_options(_OPTION_NAMES):
        return convert_checkpoint(**values, choices=choices, claim_repository=claim_repository)
