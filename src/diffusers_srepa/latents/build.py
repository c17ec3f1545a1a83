"""From the name of a latent space to its codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_srepa.latents.codec import LatentCodec
from diffusers_srepa.latents.pixels import PixelCodec


def load_codec(name_or_path: str | Path, **kwargs: Any) -> LatentCodec:
    """The codec called `name_or_path`: `"pixels"`, or an autoencoder's repository or folder.

    Args:
        name_or_path (`str`): `"pixels"` gives `PixelCodec`, everything else goes to
            `AutoencoderKLCodec.from_pretrained`.
        kwargs: arguments of `AutoencoderKLCodec.from_pretrained`, unused for pixels.

    Raises:
        ConfigurationError: there is no such autoencoder.
    """
    if str(name_or_path) == "pixels":
        return PixelCodec()
    from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLCodec

    return AutoencoderKLCodec.from_pretrained(name_or_path, **kwargs)
