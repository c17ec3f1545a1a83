"""A training checkpoint as a pipeline: the autoencoder that it names but does not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from diffusers_srepa.errors import ConfigurationError, in_options, one_line
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents


AUTOENCODER_FILE = "autoencoder.json"
"""Says where the run's autoencoder is: `pretrained_model_name_or_path`, `subfolder`, `revision` and `encoder_id`."""


def check_format(folder: Path) -> None:
    """Refuse a checkpoint of format 1, which has no `model_index.json` and whose transformer is not the averaged one.

    Raises:
        ConfigurationError: `folder` is such a checkpoint.
    """
    is_checkpoint = (folder / "state.json").is_file() and (folder / "ema.safetensors").is_file()
    if is_checkpoint and not (folder / "model_index.json").is_file():
        raise ConfigurationError(
            f"{folder} is a checkpoint of an older format, which cannot be sampled from directly: resume it with the "
            "trainer, which writes checkpoints of the new format."
        )


def load_autoencoder(
    folder: Path,
    *,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    device_map: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = False,
    **unused: Any,
) -> AutoencoderKL | None:
    """The autoencoder that a checkpoint names, or `None` if `folder` names none.

    Args:
        folder (`Path`): folder of the checkpoint.
        dtype, torch_dtype, device_map, token, cache_dir, local_files_only: as in `DiffusionPipeline.from_pretrained`.
        unused: its other arguments.

    Raises:
        ConfigurationError: there is no such autoencoder, or its encoder is not the one of the training.
    """
    file = folder / AUTOENCODER_FILE
    if not file.is_file():
        return None
    try:
        reference = json.loads(file.read_text(encoding="utf-8"))
        name = reference["pretrained_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{file} does not tell which autoencoder belongs to the checkpoint ({one_line(error)}): pass `vae=`."
        ) from error
    try:
        with in_options({"name_or_path": AUTOENCODER_FILE, "subfolder": AUTOENCODER_FILE}):
            latents = AutoencoderKLLatents.from_pretrained(
                name,
                subfolder=reference.get("subfolder"),
                revision=reference.get("revision"),
                token=token,
                cache_dir=cache_dir,
                local_files_only=bool(local_files_only),
            )
    except ConfigurationError as error:
        raise ConfigurationError(
            f"the autoencoder {name} of the checkpoint {folder} cannot be loaded: pass `vae=` ({one_line(error)})."
        ) from error
    # The training names the encoder in float32, whatever it encodes in.
    if reference.get("encoder_id") not in (None, latents.encoder_id):
        raise ConfigurationError(
            f"the autoencoder {name} is not the one that the checkpoint {folder} was trained with, its encoder is "
            "another: pass the right one as `vae=`."
        )
    chosen = torch_dtype if dtype is None else dtype
    if isinstance(chosen, dict):
        chosen = chosen.get("vae", chosen.get("default"))
    if isinstance(chosen, torch.dtype):
        latents.vae.to(chosen)
    # A component that is passed stays where it is; "balanced" leaves the place of this one to the CPU.
    if device_map not in (None, "balanced"):
        latents.to(device_map)
    return latents.vae
