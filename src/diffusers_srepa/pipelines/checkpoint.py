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
    """Refuse a checkpoint of format 1, which has no `model_index.json` and not the averaged transformer."""
    is_checkpoint = (folder / "state.json").is_file() and (folder / "ema.safetensors").is_file()
    if is_checkpoint and not (folder / "model_index.json").is_file():
        raise ConfigurationError(
            f"{folder} is a checkpoint of an older format, which cannot be sampled from directly: resume it with the "
            "trainer, which writes checkpoints of the new format."
        )


def load_autoencoder(folder: Path, **kwargs: Any) -> AutoencoderKL:
    """The autoencoder that the `autoencoder.json` of a checkpoint names, if its encoder is that of the training.

    Of the arguments of `DiffusionPipeline.from_pretrained`, `dtype`, `torch_dtype`, `device_map`, `token`, `cache_dir`
    and `local_files_only` are heeded.
    """
    try:
        reference = json.loads((folder / AUTOENCODER_FILE).read_text(encoding="utf-8"))
        name = reference["pretrained_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the {AUTOENCODER_FILE} of the checkpoint {folder} names no autoencoder ({one_line(error)}): pass `vae=`."
        ) from error
    where = {key: reference.get(key) for key in ("subfolder", "revision")}
    where |= {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
    try:
        with in_options({"name_or_path": AUTOENCODER_FILE, "subfolder": AUTOENCODER_FILE}):
            latents = AutoencoderKLLatents.from_pretrained(name, **where)
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
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    if isinstance(dtype, dict):
        dtype = dtype.get("vae", dtype.get("default"))
    # diffusers answers anything else than a dtype with a warning and float32.
    if isinstance(dtype, torch.dtype):
        latents.vae.to(dtype)
    # It leaves a component that it is passed where it is; "balanced" names no single device.
    if kwargs.get("device_map") not in (None, "balanced"):
        latents.to(kwargs["device_map"])
    return latents.vae
