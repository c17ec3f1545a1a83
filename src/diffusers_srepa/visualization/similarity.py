"""Which patches a patch resembles: one row of the token-to-token similarity matrix, laid out as a map.

The structural terms of sREPA compare exactly these maps between student and teacher, for all anchors at once.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from diffusers_srepa.tokens import TokenMap


def similarity_map(token_map: TokenMap, anchor: tuple[int, int]) -> torch.Tensor:
    """Cosine similarity of every patch token with the one at `anchor`.

    Args:
        token_map (`TokenMap`): tokens of any width; prefix tokens play no role.
        anchor (`tuple[int, int]`): row and column of the anchor on the token grid, counted from 0.

    Returns:
        `torch.Tensor`: shape `(B, h, w)`, values in [-1, 1], 1 at the anchor; float32, or float64 for float64 tokens.
        A token of zeros has similarity 0 to every token.

    Raises:
        ValueError: the anchor lies outside the grid.
    """
    height, width = token_map.grid
    row, column = anchor
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"the anchor is row {row}, column {column}, but the tokens form a grid of {height} x {width} counted "
            "from 0: choose another anchor."
        )
    tokens = F.normalize(token_map.float().patch_tokens, dim=-1)  # (B, N, D)
    anchor_token = tokens[:, row * width + column]
    return torch.einsum("bnd,bd->bn", tokens, anchor_token).clamp(-1, 1).unflatten(1, (height, width))


def similarity_maps(token_map: TokenMap, anchors: list[tuple[int, int]]) -> torch.Tensor:
    """`similarity_map` for several anchors, shape `(B, A, h, w)` with A anchors."""
    if not anchors:
        raise ValueError("there is no anchor to compare the tokens with: give at least one (row, column).")
    return torch.stack([similarity_map(token_map, anchor) for anchor in anchors], dim=1)
