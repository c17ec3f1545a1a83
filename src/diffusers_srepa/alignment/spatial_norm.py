"""iREPA's spatial normalisation of teacher tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffusers_srepa.alignment.gram.normalize import compute_dtype
from diffusers_srepa.errors import ConfigurationError
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
        ConfigurationError: `alpha` is no finite number.
    """

    alpha: float = 0.6

    def __post_init__(self) -> None:
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not is_number or not math.isfinite(self.alpha):
            raise ConfigurationError(
                f"the alpha of the spatial norm is {self.alpha!r}, but must be a finite number: change alpha."
            )

    def __call__(self, token_map: TokenMap) -> TokenMap:
        """Normalise the patch tokens of `token_map`.

        Args:
            token_map (`TokenMap`): tokens of shape `(B, P + N, D)`, N >= 2, any float dtype.

        Returns:
            `TokenMap`: same shape and grid, float32 (float64 if given).

        Raises:
            ValueError: it is no `TokenMap`, or there are fewer than two patch tokens.
        """
        if not isinstance(token_map, TokenMap):
            raise ValueError(
                f"the spatial norm takes a TokenMap, but got a {type(token_map).__name__}: wrap tokens in "
                "TokenMap(tokens, grid)."
            )
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
