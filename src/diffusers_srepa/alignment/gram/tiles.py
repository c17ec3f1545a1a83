"""How large products are walked: a few samples at a time, and within them tiles or chunks of rows.

The N x N matrices of the structural losses are symmetric, so the tile of rows `[start, stop)` needs the columns from
`start` on alone; the rest is the transpose of other tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


# What is worked on at a time should be small for the caches and for memory, and large because every step of several
# threads ends with a wait for the slowest, which costs most where other programs run beside them.
CPU_TILE_ROWS = 256
ACCELERATOR_TILE_ROWS = 1024
CPU_TILE_ELEMENTS = 1 << 20
CPU_CHUNK_ELEMENTS = 1 << 21
ACCELERATOR_ELEMENTS = 1 << 24
# Width of the column blocks of a symmetric D x D product.
GRAM_BLOCK = 256


@dataclass(frozen=True)
class RowTile:
    """Rows `[start, stop)` against columns `[start, num_tokens)`; `offset` elements of a sample come before it."""

    start: int
    stop: int
    num_tokens: int
    offset: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def columns(self) -> slice:
        return slice(self.start, self.num_tokens)

    @property
    def size(self) -> int:
        return self.num_rows * (self.num_tokens - self.start)

    def of_scratch(self, scratch: torch.Tensor, num_samples: int) -> torch.Tensor:
        """Memory for this tile at the start of a flat tensor, as `(num_samples, num_rows, num_tokens - start)`."""
        return scratch[: num_samples * self.size].view(num_samples, self.num_rows, -1)

    def of_packed(self, packed: torch.Tensor, num_samples: int) -> torch.Tensor:
        """This tile of a flat tensor that holds all tiles of a chunk one after another; contiguous, as products are
        fastest."""
        return self.of_scratch(packed[num_samples * self.offset :], num_samples)


@dataclass(frozen=True)
class ChunkPlan:
    """A walk through `(B, N, D)`: chunks of samples, and within them blocks of rows, the tokens."""

    num_samples: int
    num_tokens: int
    samples_per_chunk: int
    rows_per_block: int

    def chunks(self) -> Iterator[slice]:
        """Slices of the batch."""
        return _slices(self.num_samples, self.samples_per_chunk)

    def rows(self) -> Iterator[slice]:
        """Slices of the tokens."""
        return _slices(self.num_tokens, self.rows_per_block)

    @property
    def chunk_size(self) -> int:
        """Number of samples of the largest chunk."""
        return min(self.num_samples, self.samples_per_chunk)

    def memory(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a block of a chunk of normalised `tokens`."""
        return tokens.new_empty(self.chunk_size, self.rows_per_block, tokens.shape[2], dtype=dtype)


@dataclass(frozen=True)
class TilePlan(ChunkPlan):
    """A walk through the upper triangles of `(B, N, N)`, whose blocks of rows are tiles."""

    def tiles(self) -> Iterator[RowTile]:
        """The upper triangle in tiles of rows, the first of which holds all columns."""
        offset = 0
        for rows in self.rows():
            tile = RowTile(rows.start, rows.stop, self.num_tokens, offset)
            offset += tile.size
            yield tile

    def of_chunk(self, packed: torch.Tensor, chunk: slice) -> torch.Tensor:
        """The part of a flat tensor of `num_samples * packed_size` elements that holds the tiles of `chunk`."""
        return packed[chunk.start * self.packed_size : chunk.stop * self.packed_size]

    @property
    def tile_size(self) -> int:
        """Number of elements of the largest tile of a chunk."""
        return self.chunk_size * self.rows_per_block * self.num_tokens

    @property
    def packed_size(self) -> int:
        """Number of elements of all tiles of one sample; a closed form, since N may be symbolic."""
        rows, num_full = self.rows_per_block, self.num_tokens // self.rows_per_block
        rest = self.num_tokens - num_full * rows
        return rows * (num_full * self.num_tokens - rows * (num_full * (num_full - 1) // 2)) + rest * rest


def chunks_of_rows(tokens: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of `(B, N, D)` small enough for element-wise work."""
    num_samples, num_tokens, dim = tokens.shape
    budget = CPU_TILE_ELEMENTS if tokens.device.type == "cpu" else ACCELERATOR_ELEMENTS
    return _slices(num_tokens, max(1, budget // max(1, num_samples * dim)))


def plan_tiles(student: torch.Tensor) -> TilePlan:
    """The walk for tokens of shape `(B, N, D)`; its tiles depend on N and the device alone."""
    num_samples, num_tokens, _ = student.shape
    on_cpu = student.device.type == "cpu"
    budget = CPU_TILE_ELEMENTS if on_cpu else ACCELERATOR_ELEMENTS
    rows = min(num_tokens, CPU_TILE_ROWS if on_cpu else ACCELERATOR_TILE_ROWS)
    samples = max(1, budget // (num_tokens * rows))
    return TilePlan(num_samples, num_tokens, samples, rows)


def plan_chunks(student: torch.Tensor, teacher: torch.Tensor) -> ChunkPlan:
    """The walk for tokens `(B, N, D_S)` and `(B, N, D_T)` whose D x D products are accumulated."""
    num_samples, num_tokens, student_dim = student.shape
    teacher_dim = teacher.shape[2]
    budget = CPU_CHUNK_ELEMENTS if student.device.type == "cpu" else ACCELERATOR_ELEMENTS
    samples = max(1, min(num_samples, budget // max(student_dim, teacher_dim) ** 2))
    rows = min(num_tokens, max(CPU_TILE_ROWS, budget // (samples * (student_dim + teacher_dim))))
    return ChunkPlan(num_samples, num_tokens, samples, rows)


def add_symmetric_product_(out: torch.Tensor, block: torch.Tensor, tokens: torch.Tensor, tile: RowTile) -> None:
    """Add to `out` what one upper tile of a symmetric matrix contributes to the matrix times `tokens`, in place.

    `out` and `tokens` are `(B, N, D)`, the block is `(B, num_rows, N - start)`; the first tile overwrites `out`.
    """
    beta = 0 if tile.start == 0 else 1
    out[:, tile.rows].baddbmm_(block, tokens[:, tile.columns], beta=beta)
    if tile.stop < tile.num_tokens:
        right = block[:, :, tile.num_rows :]
        out[:, tile.stop :].baddbmm_(right.transpose(1, 2), tokens[:, tile.rows], beta=beta)


def add_upper_gram_(out: torch.Tensor, features: torch.Tensor) -> None:
    """Add `features' features` to `out` `(B, D, D)` in blocks of the upper triangle; the rest is left alone."""
    for rows in _slices(features.shape[2], GRAM_BLOCK):
        out[:, rows, rows.start :].baddbmm_(features[:, :, rows].transpose(1, 2), features[:, :, rows.start :])


def mirror_upper_(matrices: torch.Tensor) -> None:
    """Make `(B, D, D)` symmetric from its upper triangle, in place."""
    for rows in _slices(matrices.shape[1], GRAM_BLOCK):
        matrices[:, rows.stop :, rows] = matrices[:, rows, rows.stop :].transpose(1, 2)


def squared_norms(matrices: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norms of `(B, R, C)`; row by row, since one long float32 sum would lose digits."""
    return torch.linalg.vector_norm(matrices, dim=-1).square().sum(dim=-1)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
