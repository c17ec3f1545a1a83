"""Gram-KL in tiles: exact, with no N x N matrix.

With the logits `l = S / tau` off the diagonal and the row sums `q_i = sum_j exp l_ij`, the divergence of row i is
`sum_j exp(l^T_ij) (l^T_ij - l^S_ij) / q^T_i - log q^T_i + log q^S_i`. Its gradient with respect to the student's
similarities is `G = (P^S - P^T) / tau_s` with `P_ij = exp(l_ij) / q_i`, and that to the normalised tokens is
`(G + G') Z_S`: a symmetric matrix, `exp(l_ij) (1 / q_i + 1 / q_j)` of the student minus that of the teacher, times the
tokens. So both passes walk the upper tiles alone. The forward pass keeps q^T and q^S; the backward pass computes the
tiles again.

Cosines are at most 1, so the exponentials stay within `exp(+-1 / tau)` and need no shift by a row maximum as long as
the temperature is not extremely low: below 1/40 they are computed in float64, below 1/300 not here.
"""

from typing import Any

import torch

from diffusers_srepa.alignment.gram import triton_launch
from diffusers_srepa.alignment.gram.normalize import (
    compute_dtype,
    empty_gradient,
    normalize_into,
    tangent_gradient_,
)
from diffusers_srepa.alignment.gram.tiles import RowTile, add_symmetric_product_, plan_tiles


LOWEST_FLOAT32_TEMPERATURE = 1 / 40
LOWEST_TILED_TEMPERATURE = 1 / 300


def tiled_gram_kl(
    student_tokens: torch.Tensor,
    teacher_tokens: torch.Tensor,
    tau_teacher: float,
    tau_student: float,
    form: str = "auto",
) -> torch.Tensor:
    """Gram-KL (Eq. 8, mean over tokens) of raw tokens `(B, N, D_S)` and `(B, N, D_T)`, N >= 2: shape `(B,)`.

    In float32, or in float64 if both inputs are float64. Differentiable once, in the student alone. Keeps `2 B N`
    numbers for the backward pass; each pass needs normalised tokens and a few tiles besides. `form` is `"auto"`,
    `"tiled"` or `"fused"`, see `triton_launch.with_fallback`.

    Raises:
        ValueError: a temperature is below 1/300, or `form` is `"fused"` and the kernels cannot run.
    """
    if min(tau_teacher, tau_student) < LOWEST_TILED_TEMPERATURE:
        raise ValueError(
            f"the tiled forms need temperatures of at least {LOWEST_TILED_TEMPERATURE:.4f}, but tau_teacher is "
            f"{tau_teacher} and tau_student {tau_student}: raise them, or set form='reference'."
        )
    return _TiledGramKL.apply(student_tokens, teacher_tokens, tau_teacher, tau_student, form)


class _TiledGramKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, tau_teacher: float, tau_student: float, form: str
    ) -> torch.Tensor:
        losses, row_sums = _forward(student, teacher, tau_teacher, tau_student, form)
        ctx.save_for_backward(student, teacher, row_sums)
        ctx.options = (tau_teacher, tau_student, form)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _backward(grad_losses, *ctx.saved_tensors, *ctx.options), None, None, None, None


@torch.library.custom_op("diffusers_srepa::tiled_gram_kl", mutates_args=())
def _forward(
    student: torch.Tensor, teacher: torch.Tensor, tau_teacher: float, tau_student: float, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `(B,)` and the row sums of teacher and student, shape `(2, B, N)`."""
    num_samples, num_tokens, _ = student.shape
    dtype = _dtype(student, teacher, tau_teacher, tau_student)
    plan = plan_tiles(student)

    def computation(use_kernels: bool) -> tuple[torch.Tensor, torch.Tensor]:
        row_sums = student.new_empty(2, num_samples, num_tokens, dtype=dtype)
        losses = row_sums.new_empty(num_samples)
        student_memory = row_sums.new_empty(plan.chunk_size, num_tokens, student.shape[2])
        teacher_memory = row_sums.new_empty(plan.chunk_size, num_tokens, teacher.shape[2])
        scratch = row_sums.new_empty(2 if use_kernels else 3, plan.tile_size)
        for chunk in plan.chunks():
            z_student, _ = normalize_into(student_memory, student[chunk], use_kernels)
            z_teacher, _ = normalize_into(teacher_memory, teacher[chunk], use_kernels)
            sums = row_sums.new_zeros(len(z_student), 3, num_tokens)
            for tile in plan.tiles():
                teacher_logits = _logits(scratch[0], z_teacher, tile, tau_teacher)
                student_logits = _logits(scratch[1], z_student, tile, tau_student)
                if use_kernels:
                    triton_launch.add_sums_(sums, teacher_logits, student_logits, tile)
                else:
                    _add_sums_(sums, teacher_logits, student_logits, tile, scratch[2])
            teacher_sums, gaps, student_sums = sums.unbind(dim=1)
            row_sums[0, chunk], row_sums[1, chunk] = teacher_sums, student_sums
            losses[chunk] = (gaps / teacher_sums - teacher_sums.log() + student_sums.log()).mean(dim=1)
        return losses.to(compute_dtype(student, teacher)), row_sums

    return triton_launch.with_fallback(computation, form, student, dtype)


@_forward.register_fake
def _(
    student: torch.Tensor, teacher: torch.Tensor, tau_teacher: float, tau_student: float, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    num_samples, num_tokens, _ = student.shape
    losses = student.new_empty(num_samples, dtype=compute_dtype(student, teacher))
    dtype = _dtype(student, teacher, tau_teacher, tau_student)
    return losses, student.new_empty(2, num_samples, num_tokens, dtype=dtype)


@torch.library.custom_op("diffusers_srepa::tiled_gram_kl_backward", mutates_args=())
def _backward(
    grad_losses: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    row_sums: torch.Tensor,
    tau_teacher: float,
    tau_student: float,
    form: str,
) -> torch.Tensor:
    """The gradient of the losses, weighted by `grad_losses`, with respect to the raw student tokens."""
    num_tokens = student.shape[1]
    plan = plan_tiles(student)

    def computation(use_kernels: bool) -> torch.Tensor:
        gradient = torch.empty(student.shape, dtype=row_sums.dtype, device=student.device)
        factors = (grad_losses / (num_tokens * tau_student)).view(-1, 1, 1)
        student_memory = gradient.new_empty(plan.chunk_size, num_tokens, student.shape[2])
        teacher_memory = gradient.new_empty(plan.chunk_size, num_tokens, teacher.shape[2])
        scratch = gradient.new_empty(2, plan.tile_size)
        shares = row_sums.reciprocal()
        for chunk in plan.chunks():
            z_student, inverse = normalize_into(student_memory, student[chunk], use_kernels)
            z_teacher, _ = normalize_into(teacher_memory, teacher[chunk], use_kernels)
            teacher_shares, student_shares = shares[0, chunk], shares[1, chunk]
            for tile in plan.tiles():
                if use_kernels:
                    block = _logits(scratch[1], z_student, tile, tau_student)
                    teacher_logits = _logits(scratch[0], z_teacher, tile, tau_teacher)
                    triton_launch.symmetric_weights_(block, teacher_logits, student_shares, teacher_shares, tile.start)
                else:
                    block = tile.of_scratch(scratch[1], len(z_student)).zero_()
                    exponentials = _mask_diagonal_(_logits(scratch[0], z_student, tile, tau_student)).exp_()
                    _add_probabilities_(block, exponentials, student_shares, tile, sign=1)
                    exponentials = _mask_diagonal_(_logits(scratch[0], z_teacher, tile, tau_teacher)).exp_()
                    _add_probabilities_(block, exponentials, teacher_shares, tile, sign=-1)
                add_symmetric_product_(gradient[chunk], block, z_student, tile)
            tangent_gradient_(gradient[chunk], z_student, inverse * factors[chunk], use_kernels)
        return gradient.to(student.dtype)

    return triton_launch.with_fallback(computation, form, student, row_sums.dtype)


_backward.register_fake(empty_gradient)


def _dtype(student: torch.Tensor, teacher: torch.Tensor, tau_teacher: float, tau_student: float) -> torch.dtype:
    is_cold = min(tau_teacher, tau_student) < LOWEST_FLOAT32_TEMPERATURE
    return torch.float64 if is_cold else compute_dtype(student, teacher)


def _logits(scratch: torch.Tensor, normalized: torch.Tensor, tile: RowTile, tau: float) -> torch.Tensor:
    """Similarities of a tile divided by the temperature, those on the diagonal too."""
    logits = tile.of_scratch(scratch, len(normalized))
    columns = normalized[:, tile.columns].transpose(1, 2)
    return logits.baddbmm_(normalized[:, tile.rows], columns, beta=0, alpha=1 / tau)


def _mask_diagonal_(logits: torch.Tensor) -> torch.Tensor:
    """Set the diagonal to the lowest finite number, whose exponential is 0 and whose difference from itself, unlike
    that of infinities, is a number."""
    logits.diagonal(dim1=1, dim2=2).fill_(torch.finfo(logits.dtype).min)
    return logits


def _add_sums_(
    sums: torch.Tensor,
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    tile: RowTile,
    scratch: torch.Tensor,
) -> None:
    """What `triton_launch.add_sums_` does, in PyTorch; overwrites the logits."""
    _mask_diagonal_(teacher_logits)
    _mask_diagonal_(student_logits)
    weights = torch.exp(teacher_logits, out=tile.of_scratch(scratch, len(teacher_logits)))
    _add_row_sums_(sums[:, 0], weights, tile)
    _add_row_sums_(sums[:, 1], teacher_logits.sub_(student_logits).mul_(weights), tile)
    _add_row_sums_(sums[:, 2], student_logits.exp_(), tile)


def _add_row_sums_(sums: torch.Tensor, block: torch.Tensor, tile: RowTile) -> None:
    """Add to the row sums `(B, N)` of a symmetric matrix what one of its upper tiles contributes."""
    sums[:, tile.rows] += block.sum(dim=2)
    if tile.stop < tile.num_tokens:
        sums[:, tile.stop :] += block[:, :, tile.num_rows :].sum(dim=1)


def _add_probabilities_(
    block: torch.Tensor, exponentials: torch.Tensor, shares: torch.Tensor, tile: RowTile, sign: int
) -> None:
    """Add `sign * (P_ij + P_ji)` to a tile, from the exponentials on it and `1 / q` of all rows, shape `(B, N)`."""
    block.addcmul_(exponentials, shares[:, tile.rows].unsqueeze(2), value=sign)
    block.addcmul_(exponentials, shares[:, tile.columns].unsqueeze(1), value=sign)
