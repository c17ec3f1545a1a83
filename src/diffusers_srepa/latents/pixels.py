"""Pixel space: the transformer works on images in [-1, 1], without an autoencoder."""

from __future__ import annotations

from typing import Self

import torch

from diffusers_srepa.latents.latent_space import LatentSpace


class PixelLatents(LatentSpace):
    """Latents are the image itself, `2 x - 1`, with standard deviation 0.

    `encode_moments`, `sample` and `decode` work as for an autoencoder, so that nothing else has to know the
    difference.
    """

    latent_channels = 3
    downsample_factor = 1
    #: A pipeline in pixel space has no autoencoder.
    vae = None

    @property
    def encoder_id(self) -> str:
        return "pixels"

    def to(self, device: torch.device | str) -> Self:
        return self

    def _encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = images.float() * 2 - 1
        return mean, torch.zeros_like(mean)

    def _decode(self, unscaled: torch.Tensor) -> torch.Tensor:
        return unscaled
