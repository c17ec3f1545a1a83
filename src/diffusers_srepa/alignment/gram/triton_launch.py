"""Element-wise work of the structural losses as Triton kernels, each of which reads its operands once.

Matrix products stay with cuBLAS. Fused are what all forms do to tokens, before the products (normalisation from any
float dtype) and after them (the normalisation's own backward), and what the tiled Gram-KL does to a tile of logits,
about ten passes over its memory in PyTorch. Triton comes with CUDA builds of PyTorch and is imported here when first
needed. Where the kernels cannot run, or fail to compile or to launch, PyTorch does the same.

The tiles of the Gram-MSE need no kernel, as there is nothing to fuse: the second product subtracts the first one's
result within cuBLAS, and what follows is a zero diagonal and one read for the norm. The feature form has no tiles.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

import torch

from diffusers_srepa.alignment.gram.tiles import RowTile


# 16 elements per thread need about 76 registers, so that 24 warps fit on a multiprocessor; the partial sums, three per
# row and column of a block, are then a tenth of what is read at most.
BLOCK_ROWS = 64
BLOCK_COLUMNS = 64
NUM_WARPS = 8
# Of tokens, a program of four warps treats this many elements at a time, and of each token at most so many.
TOKEN_BLOCK = 4096
BLOCK_ELEMENTS = 1024
# What Triton supports.
LOWEST_COMPUTE_CAPABILITY = (8, 0)

Result = TypeVar("Result")


class KernelFailure(RuntimeError):
    """A kernel did not compile or could not be launched."""


class _Failure:
    """The first failure of a kernel in this process, after which none is tried again unless demanded."""

    reason: str | None = None


def with_fallback(
    computation: Callable[[bool], Result], form: str, tokens: torch.Tensor, dtype: torch.dtype
) -> Result:
    """Run `computation(use_kernels)` as `form` wants.

    Args:
        computation (`Callable[[bool], Result]`): starts anew without the kernels if one fails, so it must not have
            changed its operands before.
        form (`str`): `"auto"` uses the kernels where they run, and gives up on them in this process, with one warning,
            when one fails; `"fused"` demands them; `"tiled"` does without.
        tokens (`torch.Tensor`): what is computed on; its device counts.
        dtype (`torch.dtype`): in which is computed.

    Raises:
        ValueError: `form` is `"fused"` and the kernels cannot run.
    """
    if form == "tiled":
        return computation(False)
    reason = obstacle(tokens, dtype)
    if reason is None and (form == "fused" or _Failure.reason is None):
        try:
            return computation(True)
        except KernelFailure as failure:
            reason = f"a kernel failed ({failure})"
            if form == "auto":
                _give_up(reason)
    if form == "fused":
        raise ValueError(f"form='fused' cannot run because {reason}: set form='auto' to compute without kernels.")
    return computation(False)


def obstacle(tokens: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on `tokens` in `dtype`, as a clause; None where they can.

    Triton's interpreter (`TRITON_INTERPRET=1`) counts as a device, for tests on a CPU.
    """
    if dtype != torch.float32:
        return f"its kernels compute in float32 and this is {str(dtype).removeprefix('torch.')}"
    if not tokens.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels need a CUDA device and the tokens are on {tokens.device}"
    if tokens.is_cuda and not _is_supported(tokens.device):
        return "its kernels need a GPU of compute capability 8.0 or higher"
    if _kernels() is None:
        return "triton is not installed"
    return None


def normalize_into(out: torch.Tensor, tokens: torch.Tensor, zero_norm: float) -> torch.Tensor:
    """Write normalised tokens, zero where their norm is below `zero_norm`.

    Args:
        out (`torch.Tensor`): where to, float32, shape `(B, N, D)`, contiguous within a sample.
        tokens (`torch.Tensor`): same shape, any float dtype and strides.
        zero_norm (`float`): the norm below which a token counts as zero.

    Returns:
        `torch.Tensor`: `1 / |x_i|` or 0, shape `(B, N, 1)`.

    Raises:
        KernelFailure: the kernel did not compile or could not be launched.
    """
    inverses = out.new_empty(*tokens.shape[:2], 1)
    arguments = (tokens, out, inverses, *tokens.shape, *tokens.stride(), out.stride(0), zero_norm)
    _launch_on_tokens("normalize_kernel", tokens.shape, arguments)
    return inverses


def tangent_gradient_(gradient: torch.Tensor, normalized: torch.Tensor, scale: torch.Tensor) -> None:
    """Overwrite a gradient g by `(g - z (z . g)) scale`.

    Args:
        gradient (`torch.Tensor`): g, float32, shape `(B, N, D)`, contiguous within a sample.
        normalized (`torch.Tensor`): z, likewise.
        scale (`torch.Tensor`): float32, shape `(B, N, 1)`.

    Raises:
        KernelFailure: the kernel did not compile or could not be launched.
    """
    strides = gradient.stride(0), normalized.stride(0)
    _launch_on_tokens(
        "tangent_kernel", gradient.shape, (gradient, normalized, scale.contiguous(), *gradient.shape, *strides)
    )


def add_sums_(sums: torch.Tensor, teacher: torch.Tensor, student: torch.Tensor, tile: RowTile) -> None:
    """Add what one upper tile contributes to the row sums of three symmetric matrices, in place.

    They are `exp t`, `(t - s) exp t` and `exp s`, without their diagonals, t and s the logits.

    Args:
        sums (`torch.Tensor`): float32, shape `(B, 3, N)`.
        teacher (`torch.Tensor`): t, contiguous float32, shape `(B, num_rows, N - start)`.
        student (`torch.Tensor`): s, likewise.
        tile (`RowTile`): where the tile is.

    Raises:
        KernelFailure: the kernel did not compile or could not be launched.
    """
    num_samples, num_rows, num_columns = teacher.shape
    num_row_blocks, num_column_blocks = _num_blocks(num_rows, BLOCK_ROWS), _num_blocks(num_columns, BLOCK_COLUMNS)
    row_parts = sums.new_empty(num_column_blocks, num_samples, 3, num_rows)
    column_parts = sums.new_empty(num_row_blocks, num_samples, 3, num_columns - num_rows)
    arguments = (teacher, student, row_parts, column_parts, num_samples, num_rows, num_columns)
    grid = (num_samples * num_row_blocks, num_column_blocks)
    _launch("sums_kernel", grid, arguments, NUM_WARPS, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS)
    sums[:, :, tile.rows] += row_parts.sum(dim=0)
    sums[:, :, tile.stop :] += column_parts.sum(dim=0)


def symmetric_weights_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_shares: torch.Tensor,
    teacher_shares: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """`exp(s_ij) (u_i + u_j) - exp(t_ij) (v_i + v_j)` on one upper tile, 0 on the diagonal; overwrites the logits s.

    Args:
        student (`torch.Tensor`): s, contiguous float32, shape `(B, num_rows, N - start)`.
        teacher (`torch.Tensor`): t, likewise.
        student_shares (`torch.Tensor`): u, contiguous float32, shape `(B, N)`.
        teacher_shares (`torch.Tensor`): v, likewise.
        start (`int`): first row and column of the tile.

    Raises:
        KernelFailure: the kernel did not compile or could not be launched.
    """
    num_samples, num_rows, num_columns = student.shape
    shares = teacher_shares[:, start:], student_shares[:, start:]
    arguments = (teacher, student, *shares, student_shares.shape[1], num_rows, num_columns)
    grid = (num_samples * _num_blocks(num_rows, BLOCK_ROWS), _num_blocks(num_columns, BLOCK_COLUMNS))
    _launch("weights_kernel", grid, arguments, NUM_WARPS, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS)
    return student


def _launch_on_tokens(name: str, shape: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    """Launch a kernel on tokens of shape `(B, N, D)`."""
    num_samples, num_tokens, dim = shape
    block_elements = min(1 << (dim - 1).bit_length(), BLOCK_ELEMENTS)
    block_tokens = TOKEN_BLOCK // block_elements
    grid = (_num_blocks(num_samples * num_tokens, block_tokens),)
    _launch(name, grid, arguments, BLOCK_TOKENS=block_tokens, BLOCK_ELEMENTS=block_elements)


def _launch(
    name: str, grid: tuple[int, ...], arguments: tuple[Any, ...], num_warps: int = 4, **constants: int
) -> None:
    """Launch a kernel on the device of its first argument, which need not be the current one."""
    device = arguments[0].device
    try:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            kernel = getattr(_kernels(), name)
            kernel[grid](*arguments, **constants, num_warps=num_warps)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # A compiler, a driver and a linker may each fail in ways of their own.
        raise KernelFailure(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from diffusers_srepa.alignment.gram import triton_kernels
    except Exception:
        # Not only ImportError: a triton that does not fit the system fails in other ways.
        return None
    return triton_kernels


@lru_cache
def _is_supported(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= LOWEST_COMPUTE_CAPABILITY


def _give_up(reason: str) -> None:
    if _Failure.reason is None:
        warnings.warn(
            f"The structural losses do without their Triton kernels from here on because {reason}; the results are "
            "the same, somewhat slower.",
            RuntimeWarning,
        )
        _Failure.reason = reason


def _num_blocks(length: int, block: int) -> int:
    return -(-length // block)
