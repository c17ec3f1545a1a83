"""One resampling of learned position tables for every family.

`transformers` interpolates a tower's position table inside `forward`, with a kernel that differs between families and
is mostly not antialiased. REPA and iREPA resample the table once, bicubic and antialiased in float32, class row kept.
From 37 x 37 to 16 x 16 rows the two differ a lot, so the table is resampled here and the tower's own interpolation
replaced.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from diffusers_srepa.tokens import Grid


def resample_position_table(table: torch.Tensor, old_grid: Grid, new_grid: Grid) -> torch.Tensor:
    """Resample the patch rows of a position table, bicubic and antialiased, in float32; leading rows are kept.

    The table `(1, P + h * w, D)` has P prefix rows, then the patch rows of its grid `(h, w)` in row-major order.
    """
    table = table.float()
    if tuple(old_grid) == tuple(new_grid):
        return table
    num_prefix_rows = table.shape[1] - old_grid[0] * old_grid[1]
    prefix, patches = table[:, :num_prefix_rows], table[:, num_prefix_rows:]
    patch_map = patches.transpose(1, 2).unflatten(2, old_grid)
    patch_map = F.interpolate(patch_map, size=new_grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([prefix, patch_map.flatten(2).transpose(1, 2)], dim=1)


class PositionTable:
    """The position table of one tower: written into the tower for its grid, resampled on demand for any other grid."""

    def __init__(self, native: torch.Tensor, native_grid: Grid, grid: Grid, patch_size: int) -> None:
        # A plain float32 copy on the CPU: `.to(...)` of the tower neither moves nor rounds it.
        self.native = native.detach().to(device="cpu", dtype=torch.float32, copy=True)
        self.native_grid = native_grid
        self.grid = grid
        self.patch_size = patch_size
        self.resampled: dict[tuple[Grid, torch.device, torch.dtype], torch.Tensor] = {}

    def rows_like(self, grid: Grid, current: torch.Tensor) -> torch.Tensor:
        """The table for `grid` with the device and dtype of `current`, which is the tower's own table for its grid."""
        if grid == self.grid:
            return current
        key = (grid, current.device, current.dtype)
        if key not in self.resampled:
            resampled = resample_position_table(self.native, self.native_grid, grid)
            self.resampled[key] = resampled.to(device=current.device, dtype=current.dtype)
        return self.resampled[key]


def install_position_table(tower: nn.Module, native_grid: Grid | None, grid: Grid, patch_size: int) -> None:
    """Resample the learned position table of `tower` for `grid`, write it back, and replace the tower's interpolation.

    A tower without such a table (with rotary embeddings) is left alone.
    """
    for module in tower.modules():
        table = _table_of(module)
        if table is None or native_grid is None or table.shape[1] < native_grid[0] * native_grid[1]:
            continue
        module.srepa_positions = PositionTable(table, native_grid, grid, patch_size)  # type: ignore[assignment]
        resampled = resample_position_table(table.detach().cpu(), native_grid, grid)
        _write_table(module, resampled.to(device=table.device, dtype=table.dtype))
        # Not a closure: `copy.deepcopy` and `pickle` bind a partial to the copied module.
        module.interpolate_pos_encoding = partial(_interpolate_pos_encoding, module)  # type: ignore[assignment]
        return


def _interpolate_pos_encoding(module: nn.Module, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Stands in for the method of the same name of `transformers` embeddings; `height` and `width` are pixels."""
    positions: PositionTable = module.srepa_positions  # type: ignore[assignment]
    table = _table_of(module)
    if table is None:
        raise RuntimeError("the position table of this teacher was removed after it was loaded.")
    return positions.rows_like((height // positions.patch_size, width // positions.patch_size), table)


def _table_of(module: nn.Module) -> torch.Tensor | None:
    """The learned table `(1, P + N, D)` of an embeddings module of `transformers`, if it is one that interpolates."""
    if not callable(getattr(module, "interpolate_pos_encoding", None)):
        return None
    embedding = getattr(module, "position_embedding", None)
    if isinstance(embedding, nn.Embedding):
        return embedding.weight.unsqueeze(0)
    table = getattr(module, "position_embeddings", None)
    return table if isinstance(table, torch.Tensor) and table.ndim == 3 else None


def _write_table(module: nn.Module, table: torch.Tensor) -> None:
    if isinstance(getattr(module, "position_embedding", None), nn.Embedding):
        num_rows, dim = table.shape[1:]
        module.position_embedding = nn.Embedding(num_rows, dim, _weight=table[0].clone())
        module.position_embedding.requires_grad_(False)
        module.register_buffer("position_ids", torch.arange(num_rows, device=table.device)[None], persistent=False)
    else:
        module.position_embeddings = nn.Parameter(table.clone(), requires_grad=False)
