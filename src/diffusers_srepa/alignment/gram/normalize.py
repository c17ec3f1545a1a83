"""L2 normalisation of tokens, with a rule for zero tokens that keeps gradients finite."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_srepa.alignment.gram import triton_launch
from diffusers_srepa.alignment.gram.tiles import chunks_of_rows


ZERO_NORM = 1e-6
"""A token whose norm is below this counts as zero."""


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of the losses: float64 if every tensor is float64, else float32."""
    return torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def inverse_norms(tokens: torch.Tensor) -> torch.Tensor:
    """`1 / |x_i|` for each of the tokens `(..., D)`, and 0 for a token with `|x_i| < 1e-6`; shape `(..., 1)`."""
    norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    is_zero = norms < ZERO_NORM
    # The inner `where` keeps 1 / 0 out of the graph: its infinite derivative times the outer zero would be NaN.
    return torch.where(is_zero, torch.zeros_like(norms), 1.0 / torch.where(is_zero, torch.ones_like(norms), norms))


def normalize_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Unit-length tokens `x_i / |x_i|`, `(..., D)`; one with norm below 1e-6 becomes zero and gets zero gradient.

    `torch.nn.functional.normalize` divides such a token by its epsilon instead, so its gradient is of order 1e12 and
    gradient clipping then erases the step.
    """
    return tokens * inverse_norms(tokens)


def normalize_into(
    out: torch.Tensor, tokens: torch.Tensor, use_kernels: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write normalised tokens to reused memory; fresh memory would cost more than the arithmetic.

    `out` is contiguous, at least as large as the tokens `(B, N, D)` in batch and rows, and of the dtype of the
    computation. `use_kernels` says whether to use a Triton kernel; where it runs and works if left out. Returned are
    the normalised tokens, a view of `out`, and `1 / |x_i|` or 0, `(B, N, 1)`.
    """
    normalized = out[: tokens.shape[0], : tokens.shape[1]]

    def computation(with_kernels: bool) -> torch.Tensor:
        if with_kernels:
            return triton_launch.normalize_into(normalized, tokens, ZERO_NORM)
        raw = tokens if tokens.dtype == out.dtype else normalized.copy_(tokens)
        inverse = inverse_norms(raw)
        torch.mul(raw, inverse, out=normalized)
        return inverse

    if use_kernels is None:
        return normalized, triton_launch.with_fallback(computation, "auto", tokens, out.dtype)
    return normalized, computation(use_kernels)


def empty_gradient(grad_losses: torch.Tensor, student: torch.Tensor, *saved: Any) -> torch.Tensor:
    """What the backward operators return, for `torch.compile`: a gradient of the student's shape and dtype."""
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def tangent_gradient_(
    gradient: torch.Tensor, normalized: torch.Tensor, scale: torch.Tensor, use_kernels: bool | None = None
) -> None:
    """The gradient with respect to raw tokens from the one with respect to normalised tokens, in place.

    For `z = x / |x|` it is `(g - z (z . g)) / |x|`; a zero token has `z = 0` and scale 0 and so gets none. Both
    `gradient` g, overwritten by the result, and `normalized` z are `(B, N, D)`, contiguous within a sample; `scale` is
    `1 / |x|`, times any factor, `(B, N, 1)`. `use_kernels` is as in `normalize_into`.
    """

    def computation(with_kernels: bool) -> None:
        if with_kernels:
            triton_launch.tangent_gradient_(gradient, normalized, scale)
            return
        for rows in chunks_of_rows(gradient):
            part, direction = gradient[:, rows], normalized[:, rows]
            # Not `vecdot`: a backward pass inside an autocast region would run it in bfloat16.
            radial = (part * direction).sum(dim=-1, keepdim=True)
            part.addcmul_(direction, radial, value=-1).mul_(scale[:, rows])

    if use_kernels is None:
        # Starting anew is safe though in place: a kernel that cannot be launched has written nothing.
        triton_launch.with_fallback(computation, "auto", gradient, gradient.dtype)
    else:
        computation(use_kernels)
