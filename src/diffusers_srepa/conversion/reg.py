"""The class token of REG, which stands before the patch tokens and has no position.

REG's table of positions has a row for it nevertheless, always zero; the model here has none.
"""

from __future__ import annotations

import torch


def drop_class_position(positions: torch.Tensor) -> torch.Tensor:
    """`(1, 1 + N, D)` to the patch tokens' `(1, N, D)`."""
    return positions[:, 1:]


def add_class_position(positions: torch.Tensor) -> torch.Tensor:
    """`(1, N, D)` to `(1, 1 + N, D)` with a first row of zeros."""
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
