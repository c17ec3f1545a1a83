"""The interface of latent spaces: images to latents of the scale that a transformer learns, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch

from diffusers_srepa.errors import ConfigurationError


class LatentSpace(ABC):
    """Images in [0, 1] to latents and back; frozen, without gradients.

    Attributes:
        latent_channels (`int`): channels C of a latent.
        downsample_factor (`int`): image pixels per latent pixel and side.
        scaling_factor (`float`), shift_factor (`float`): latents are (z - shift_factor) * scaling_factor.
        encoder_id (`str`): identity of what `encode_moments` computes; equal ids give equal moments, so a cache of
            moments records it.
    """

    latent_channels: int
    downsample_factor: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    @property
    @abstractmethod
    def encoder_id(self) -> str:
        """Stable identity of the encoder's configuration and weights."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move the autoencoder to `device`, in place; returns itself."""

    @abstractmethod
    def _encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of checked `images`."""

    @abstractmethod
    def _decode(self, unscaled: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] of unscaled latents, not yet clamped."""

    @torch.no_grad()
    def encode_moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents of `images`, unscaled.

        Args:
            images (`torch.Tensor`): floating point in [0, 1], shape `(B, 3, H, W)`, H and W multiples of
                `downsample_factor`, on the autoencoder's device.

        Returns:
            Two float32 tensors of shape `(B, C, H / f, W / f)`.

        Raises:
            ValueError: shape, kind or range of `images` is another.
        """
        self._check_images(images)
        mean, std = self._encode(images)
        return mean.float(), std.float()

    def sample(self, mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Scaled latents `(mean + std * noise - shift) * scale`, all of shape `(B, C, h, w)`.

        Raises:
            ValueError: the three shapes differ.
        """
        if not mean.shape == std.shape == noise.shape:
            raise ValueError(
                f"mean, std and noise must have one shape, but have {tuple(mean.shape)}, {tuple(std.shape)} and "
                f"{tuple(noise.shape)}."
            )
        return (mean + std * noise - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of scaled `latents`.

        Args:
            latents (`torch.Tensor`): shape `(B, C, h, w)`.

        Returns:
            `torch.Tensor`: float32 in [0, 1], shape `(B, 3, h * f, w * f)`.

        Raises:
            ValueError: `latents` has another number of dimensions or channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents must have shape (B, {self.latent_channels}, h, w), but have {tuple(latents.shape)}."
            )
        images = self._decode(latents / self.scaling_factor + self.shift_factor)
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of the latent of an image of `height` x `width` pixels.

        Raises:
            ConfigurationError: a side is no positive multiple of `downsample_factor`.
        """
        factor = self.downsample_factor
        if height < factor or width < factor or height % factor or width % factor:
            raise ConfigurationError(
                f"images of {height} x {width} pixels cannot be encoded, because both sides must be multiples of "
                f"{factor}: change the resolution (option `resolution`)."
            )
        return self.latent_channels, height // factor, width // factor

    def _check_images(self, images: torch.Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W), but have {tuple(images.shape)}.")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [0, 1], but are {images.dtype}: divide uint8 by 255.")
        self.latent_shape(images.shape[2], images.shape[3])
        if images.shape[0] == 0:
            return
        low, high = (value.item() for value in images.aminmax())
        # Written so that NaN fails too; the margin forgives the rounding of resampling in half precision.
        if not (low >= -1e-2 and high <= 1 + 1e-2):
            raise ValueError(f"images must lie in [0, 1], but reach from {low:.4g} to {high:.4g}.")
