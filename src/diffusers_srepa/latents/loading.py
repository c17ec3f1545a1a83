"""Latent spaces by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_srepa.latents.latent_space import LatentSpace
from diffusers_srepa.latents.pixels import PixelLatents


def load_latent_space(name_or_path: str | Path, **kwargs: Any) -> LatentSpace:
    """The latent space called `name_or_path`: `"pixels"`, or an autoencoder's repository or folder.

    Everything but `"pixels"` goes to `AutoencoderKLLatents.from_pretrained`, with its arguments in `kwargs`.
    """
    if str(name_or_path) == "pixels":
        return PixelLatents()
    from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents

    return AutoencoderKLLatents.from_pretrained(name_or_path, **kwargs)
