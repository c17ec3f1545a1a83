"""From a checkpoint file to a pipeline's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from diffusers_srepa.alignment.projectors import save_projector
from diffusers_srepa.conversion.class_names import find_class_names
from diffusers_srepa.conversion.layout import FORMATS, Choices, Layout, read_layout
from diffusers_srepa.conversion.projectors import build_projector, name_projectors
from diffusers_srepa.conversion.read import Weights, check_finite, read_checkpoint, select_weights
from diffusers_srepa.conversion.weights import to_diffusers, to_repa_convention
from diffusers_srepa.errors import ConfigurationError, in_options, one_line
from diffusers_srepa.files import check_output_place, remedy, written_folder
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.latents.loading import load_latent_space
from diffusers_srepa.models.loading import PROJECTORS
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.publishing.card_facts import ConvertedCardFacts
from diffusers_srepa.publishing.model_card import write_model_card
from diffusers_srepa.schedulers.registry import build_scheduler


PIPELINE_FILE = "model_index.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")
# SiT's own `forward_with_cfg` guides three channels of the four.
GUIDANCE_CHANNELS = 3


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Args:
        path (`Path`): the pipeline's folder, or the file of an exported state dict.
        summary (`str`): a sentence about what was found and written.
        notes (`tuple[str, ...]`): what the user should know beyond it.
        repository (`str`, *optional*): the Hub repository that was claimed for it.
        parts (`tuple[str, ...]`): folders that were written beside the pipeline's components.
    """

    path: Path
    summary: str
    notes: tuple[str, ...] = ()
    repository: str | None = None
    parts: tuple[str, ...] = ()


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    vae: str | Path | None = None,
    vae_subfolder: str | None = None,
    vae_revision: str | None = None,
    weights: str | None = None,
    choices: Choices | None = None,
    scheduler: str = "euler-maruyama",
    dtype: str | None = None,
    id2label: str | None = None,
    projector_names: Sequence[str] | None = None,
    overwrite: bool = False,
    claim_repository: Callable[[], str] | None = None,
) -> Conversion:
    """Convert an official checkpoint of SiT, REPA, iREPA or REG to a folder for `SiTPipeline.from_pretrained`.

    Everything is checked before anything is written, and the folder appears whole or not at all. Projectors go to
    `output_dir/projectors/<name>`, from where `--model.init_from` takes them up.

    Args:
        checkpoint (`str` or `Path`): the file, see [`read_checkpoint`].
        output_dir (`str` or `Path`): folder to write; it must be empty or not exist, unless `overwrite` is set.
        vae (`str` or `Path`): autoencoder of the latents, a folder or Hub id, or "pixels" for a model of pixels.
        vae_subfolder, vae_revision (`str`, *optional*): where the autoencoder is in its repository.
        weights (`str`, *optional*): "ema" or "model"; by default the average where there is one.
        choices (`Choices`, *optional*): what the tensors do not show.
        scheduler (`str`): "euler-maruyama" or "euler".
        dtype (`str`, *optional*): precision of transformer and projectors, "float32", "bfloat16", "float16" or
            "float64"; by default the checkpoint's.
        id2label (`str`, *optional*): "imagenet", "none" or a JSON file; by default ImageNet's names for 1000 classes.
        projector_names (`Sequence[str]`, *optional*): folder names of the projectors, by default "default" for the
            first.
        overwrite (`bool`): whether a pipeline in `output_dir` may be replaced.
        claim_repository (`Callable[[], str]`, *optional*): called after the checks and before writing; returns the Hub
            id that the model card names.

    Raises:
        ConfigurationError: anything that cannot be converted, in one sentence; nothing has been written then.
    """
    target = Path(output_dir)
    if vae is None:
        raise ConfigurationError(
            "no autoencoder was given: set `vae`, for example to stabilityai/sd-vae-ft-ema, or to pixels for a model "
            "of pixels."
        )
    precision = find_dtype(dtype)
    _check_target(target, overwrite, [checkpoint, vae, *([id2label] if id2label else [])])
    selected = select_weights(read_checkpoint(checkpoint), weights)
    layout = read_layout(selected, choices or Choices())
    names = name_projectors(len(layout.projectors), projector_names)
    labels = find_class_names(id2label, layout.config["num_classes"])
    sampler = build_scheduler(scheduler, layout.path_type)
    autoencoder = _load_vae(vae, vae_subfolder, vae_revision, layout.config["in_channels"])
    transformer, projectors = _convert(selected, layout, names, precision)
    is_guided_in_part = layout.format == "sit" and layout.config["in_channels"] > GUIDANCE_CHANNELS
    pipeline = SiTPipeline(
        transformer=transformer,
        vae=autoencoder,
        scheduler=sampler,
        id2label=labels,
        guidance_channels=GUIDANCE_CHANNELS if is_guided_in_part else None,
    )
    parts = {f"{PROJECTORS}/{name}": projector for name, projector in projectors.items()}
    repository = claim_repository() if claim_repository is not None else None
    facts = _facts(selected, layout, pipeline, list(projectors), repository)
    with written_or_refused(target), written_folder(target.resolve()) as folder:
        pipeline.save_pretrained(folder)
        for name, projector in parts.items():
            save_projector(projector, folder / name)
        write_model_card(folder, facts=facts)
    return Conversion(target, _summary(facts, layout), _notes(selected, layout, weights), repository, tuple(parts))


def _check_target(target: Path, overwrite: bool, sources: Sequence[str | Path]) -> None:
    """Refuse a folder that must not be written to: one that is taken, or that holds a source, a path or Hub id."""
    check_output_place(target)
    place = target.resolve()
    for source in sources:
        path = Path(source).resolve()
        if Path(source).exists() and (path == place or place in path.parents):
            raise ConfigurationError(
                f"`output_dir` {target} holds what is read, {source}: choose another folder, so that nothing is lost."
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"`output_dir` {target} is a file, but must be a folder.")
    if place in (Path.cwd(), *Path.cwd().parents):
        raise ConfigurationError(f"`output_dir` {target} is the current folder or above it: choose another one.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigurationError(
            f"the folder {target} is not empty: choose another `output_dir`, or replace the pipeline in it by "
            "`overwrite`."
        )
    if not (target / PIPELINE_FILE).is_file():
        raise ConfigurationError(
            f"the folder {target} holds no pipeline ({PIPELINE_FILE}), and `overwrite` replaces nothing else: choose "
            "another `output_dir`."
        )


def _facts(
    selected: Weights, layout: Layout, pipeline: SiTPipeline, projectors: Sequence[str], repository: str | None
) -> ConvertedCardFacts:
    config = layout.config
    return ConvertedCardFacts(
        format=layout.format,
        model_name=layout.model_name,
        num_parameters=pipeline.transformer.num_parameters(),
        num_classes=config["num_classes"],
        channels=config["in_channels"],
        latent_size=" x ".join(str(size * config["patch_size"]) for size in pipeline.transformer.grid_size),
        source=selected.source,
        steps=selected.steps,
        guidance_channels=pipeline.config.guidance_channels,
        projectors=projectors,
        encoder_depth=layout.encoder_depth,
        id2label=pipeline.config.id2label,
        hub_id=repository,
    )


def _convert(
    selected: Weights, layout: Layout, projector_names: Sequence[str], dtype: torch.dtype | None
) -> tuple[SiTTransformer2DModel, dict[str, nn.Module]]:
    """The transformer and the projectors by name; empties the state dict."""
    state = selected.state
    check_finite(state)
    if layout.format == "sit":
        to_repa_convention(state, layout.config["in_channels"], layout.final_channels)
    # Without memory, and so without initial values, until the weights are there.
    with torch.device("meta"):
        transformer = SiTTransformer2DModel(**layout.config)
    transformer.load_state_dict(to_diffusers(state, layout.config["class_token_dim"] is not None, dtype), assign=True)
    projectors: dict[str, nn.Module] = {}
    for name, (number, weights) in zip(projector_names, layout.projectors.items(), strict=True):
        check_finite({f"projectors.{number}.{key}": value for key, value in weights.items()})
        projectors[name] = build_projector(number, weights, layout.dim, dtype)
    if dtype is not None:
        for module in (transformer, *projectors.values()):
            check_finite(module.state_dict(), remedy=f"they do not fit into {dtype}; choose another `dtype`")
    return transformer.eval(), projectors


def _load_vae(name: str | Path, subfolder: str | None, revision: str | None, channels: int) -> Any:
    """The autoencoder in float32, or None for pixels."""
    where = {} if str(name) == "pixels" else {"subfolder": subfolder, "revision": revision}
    with in_options({"name_or_path": "`vae`", "subfolder": "`vae_subfolder`", "revision": "`vae_revision`"}):
        space = load_latent_space(name, **where)
    if space.latent_channels != channels:
        raise ConfigurationError(
            f"the autoencoder {name} has {space.latent_channels} latent channels, but the checkpoint has {channels}: "
            "change `vae`."
        )
    if not isinstance(space, AutoencoderKLLatents):
        return None
    if Path(name).exists():
        # diffusers writes the name into the configuration, where a published pipeline would show a local path.
        space.vae.register_to_config(_name_or_path="")
    return space.vae


def find_dtype(name: str | None) -> torch.dtype | None:
    """The dtype called `name`, None for None."""
    if name is not None and name not in DTYPES:
        raise ConfigurationError(f"`dtype` is {name!r}, but must be one of {', '.join(DTYPES)}.")
    return None if name is None else getattr(torch, name)


@contextmanager
def written_or_refused(target: Path) -> Iterator[None]:
    """Around writing `target`: a disk that fails is a refusal in one sentence."""
    try:
        yield
    # torch.save reports a full disk as a RuntimeError.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(
            f"{target} cannot be written ({one_line(error)}): {remedy(error)}, or choose another `output_dir`."
        ) from error


def _summary(facts: ConvertedCardFacts, layout: Layout) -> str:
    config = layout.config
    blocks, projectors = config["num_layers"], len(facts.projectors)
    return (
        f"{FORMATS[layout.format]} checkpoint"
        + (f", {facts.source} weights" if facts.source else "")
        + (f" after {facts.steps} steps" if facts.steps is not None else "")
        + f": {blocks} block{'s' * (blocks != 1)} of width {layout.dim}, {config['num_attention_heads']} heads, patch "
        + f"{config['patch_size']}, latents {facts.channels} x {facts.latent_size}, {facts.num_classes} classes, "
        + f"{layout.path_type} path, {projectors or 'no'} projector{'s' * (projectors != 1)}"
    )


def _notes(selected: Weights, layout: Layout, weights: str | None) -> tuple[str, ...]:
    notes = []
    if selected.source == "model" and weights is None:
        notes.append("the checkpoint has no averaged weights (ema): those of the model were taken.")
    if layout.format == "sit" and "prediction" not in selected.arguments:
        notes.append(
            "the checkpoint does not say what it predicts: a velocity model of the "
            f"{layout.path_type} path was assumed."
        )
    if layout.encoder_depth is not None:
        notes.append(
            f"the projectors read block {layout.encoder_depth}: continue aligned training with --alignment.depth "
            f"{layout.encoder_depth}."
        )
    if layout.config["class_dropout_prob"] == 0:
        notes.append("the model has no null class, so it cannot be guided.")
    return tuple(notes)
