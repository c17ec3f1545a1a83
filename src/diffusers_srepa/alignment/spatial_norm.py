"""iREPA's spatial normalisation of teacher tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffusers_srepa.alignment.structural.normalize import compute_dtype
from diffusers_srepa.tokens import TokenMap


SPATIAL_NORM_EPS = 1e-6


@dataclass(frozen=True)
class SpatialNorm:
    """Take part of the mean token away and scale each feature: `(z - alpha * mean(z)) / (std(z) + 1e-6)`.

    Mean and unbiased standard deviation run over the patch tokens of one sample, per feature. Raises the contrast
    between tokens (iREPA, arXiv 2512.10794; its released code uses alpha 0.6 for latents, 0.8 for pixels). Prefix
    tokens have no place on the grid: they are neither counted nor changed.

    Args:
        alpha (`float`): the share of the mean that is removed.

    Raises:
        ValueError: `alpha` is not finite.
    """

    alpha: float = 0.6

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"the alpha of the spatial norm must be a finite number, but is {self.alpha!r}.")

    def __call__(self, token_map: TokenMap) -> TokenMap:
        """Normalise the patch tokens of `token_map`.

        Args:
            token_map (`TokenMap`): tokens of shape `(B, P + N, D)`, N >= 2, any float dtype.

        Returns:
            `TokenMap`: same shape and grid, float32 (float64 if given).

        Raises:
            ValueError: there are fewer than two patch tokens.
        """
        dtype = compute_dtype(token_map.tokens)
        patch_tokens = token_map.patch_tokens.to(dtype)
        if patch_tokens.shape[1] < 2:
            raise ValueError(
                f"the spatial norm needs at least 2 patch tokens, but got {patch_tokens.shape[1]}: use a larger token "
                "grid, or leave the spatial norm out."
            )
        std, mean = torch.std_mean(patch_tokens, dim=1, keepdim=True, correction=1)
        patch_tokens = (patch_tokens - self.alpha * mean) / (std + SPATIAL_NORM_EPS)
        return token_map.with_tokens(torch.cat([token_map.prefix_tokens.to(dtype), patch_tokens], dim=1))
