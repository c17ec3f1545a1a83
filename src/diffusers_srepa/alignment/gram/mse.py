"""Gram-MSE in two exact forms: through N x N matrices (the Gram form) and through D x D matrices (the feature form).

The Gram form, for small and medium N: with `M = S_T - S_S`, diagonal left out, the loss of a sample is
`|M|^2 / (N (N - 1))` and its gradient with respect to the normalised student tokens is `-4 M Z_S / (N (N - 1))`. M is
symmetric: the upper tiles are computed, kept for the backward pass, and used twice there. TensorFloat-32 products,
where the user has switched them on, are used here: an error of M is relative to similarities, not to sums of their
squares as in the feature form, and such products move the gradient by less than tokens that come in bfloat16 do, at
any distance between student and teacher.

The feature form, linear in N, for many tokens: with the normalised tokens Z of a sample,
`|Z_T Z_T' - Z_S Z_S'|^2 = |Z_T' Z_T|^2 - 2 |Z_T' Z_S|^2 + |Z_S' Z_S|^2`. The sum includes the diagonal, which differs
from zero only where exactly one of two tokens counts as zero, by 1. The three terms nearly cancel when student and
teacher agree: in float32 the loss has an error of about `1e-5 (|S_T|^2 + |S_S|^2) / (N (N - 1))`, so that
TensorFloat-32 products, a thousand times coarser, are switched off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffusers_srepa.alignment.gram.normalize import (
    compute_dtype,
    empty_gradient,
    normalize_into,
    tangent_gradient_,
)
from diffusers_srepa.alignment.gram.tiles import (
    add_symmetric_product_,
    add_upper_gram_,
    mirror_upper_,
    plan_chunks,
    plan_tiles,
    squared_norms,
)


def gram_form_mse(student_tokens: torch.Tensor, teacher_tokens: torch.Tensor) -> torch.Tensor:
    """Gram-MSE of raw tokens `(B, N, D_S)` and `(B, N, D_T)`, N >= 2: one value per sample, shape `(B,)`.

    Computed in float32, or in float64 if both inputs are float64. Differentiable once, in the student alone.
    """
    return _GramFormMSE.apply(student_tokens, teacher_tokens)


class _GramFormMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        losses, differences = _gram_forward(student, teacher)
        ctx.save_for_backward(student, differences)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor, None]:
        student, differences = ctx.saved_tensors
        return _gram_backward(grad_losses, student, differences), None


@torch.library.custom_op("diffusers_srepa::gram_form_mse", mutates_args=())
def _gram_forward(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `(B,)` and the packed upper tiles of M."""
    num_samples, num_tokens, _ = student.shape
    dtype = compute_dtype(student, teacher)
    plan = plan_tiles(student)
    losses = student.new_zeros(num_samples, dtype=dtype)
    differences = student.new_empty(num_samples * plan.packed_size, dtype=dtype)
    student_memory = student.new_empty(plan.chunk_size, num_tokens, student.shape[2], dtype=dtype)
    teacher_memory = student.new_empty(plan.chunk_size, num_tokens, teacher.shape[2], dtype=dtype)
    for chunk in plan.chunks():
        z_student, _ = normalize_into(student_memory, student[chunk])
        z_teacher, _ = normalize_into(teacher_memory, teacher[chunk])
        packed = plan.of_chunk(differences, chunk)
        for tile in plan.tiles():
            block = tile.of_packed(packed, len(z_student))
            block.baddbmm_(z_teacher[:, tile.rows], z_teacher[:, tile.columns].transpose(1, 2), beta=0)
            block.baddbmm_(z_student[:, tile.rows], z_student[:, tile.columns].transpose(1, 2), alpha=-1)
            # Exact also where a zero token makes only one of the two diagonals differ from 1.
            block.diagonal(dim1=1, dim2=2).zero_()
            inside, right = block.split([tile.num_rows, tile.num_tokens - tile.stop], dim=2)
            losses[chunk] += squared_norms(inside) + 2 * squared_norms(right)
    return losses / (num_tokens * (num_tokens - 1)), differences


@_gram_forward.register_fake
def _(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_samples = student.shape[0]
    dtype = compute_dtype(student, teacher)
    packed_size = num_samples * plan_tiles(student).packed_size
    return student.new_empty(num_samples, dtype=dtype), student.new_empty(packed_size, dtype=dtype)


@torch.library.custom_op("diffusers_srepa::gram_form_mse_backward", mutates_args=())
def _gram_backward(grad_losses: torch.Tensor, student: torch.Tensor, differences: torch.Tensor) -> torch.Tensor:
    """The gradient of the losses, weighted by `grad_losses`, with respect to the raw student tokens."""
    num_tokens = student.shape[1]
    plan = plan_tiles(student)
    gradient = torch.empty(student.shape, dtype=differences.dtype, device=student.device)
    factors = (grad_losses * (-4 / (num_tokens * (num_tokens - 1)))).view(-1, 1, 1)
    memory = gradient.new_empty(plan.chunk_size, num_tokens, student.shape[2])
    for chunk in plan.chunks():
        z_student, inverse = normalize_into(memory, student[chunk])
        packed = plan.of_chunk(differences, chunk)
        for tile in plan.tiles():
            add_symmetric_product_(gradient[chunk], tile.of_packed(packed, len(z_student)), z_student, tile)
        tangent_gradient_(gradient[chunk], z_student, inverse * factors[chunk])
    return gradient.to(student.dtype)


_gram_backward.register_fake(empty_gradient)


def feature_form_mse(student_tokens: torch.Tensor, teacher_tokens: torch.Tensor) -> torch.Tensor:
    """As `gram_form_mse`; keeps `B D_S (D_S + D_T)` numbers for the backward pass."""
    return _FeatureFormMSE.apply(student_tokens, teacher_tokens)


class _FeatureFormMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        losses, cross, own = _feature_forward(student, teacher)
        ctx.save_for_backward(student, teacher, cross, own)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _feature_backward(grad_losses, *ctx.saved_tensors), None


@torch.library.custom_op("diffusers_srepa::feature_form_mse", mutates_args=())
def _feature_forward(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses `(B,)`, `Z_T' Z_S` of shape `(B, D_T, D_S)` and `Z_S' Z_S` of shape `(B, D_S, D_S)`."""
    (num_samples, num_tokens, student_dim), teacher_dim = student.shape, teacher.shape[2]
    dtype = compute_dtype(student, teacher)
    cross = student.new_zeros(num_samples, teacher_dim, student_dim, dtype=dtype)
    own = student.new_zeros(num_samples, student_dim, student_dim, dtype=dtype)
    losses = student.new_zeros(num_samples, dtype=dtype)
    plan = plan_chunks(student, teacher)
    student_memory, teacher_memory = plan.memory(student, dtype), plan.memory(teacher, dtype)
    target_memory = student.new_empty(plan.chunk_size, teacher_dim, teacher_dim, dtype=dtype)
    with full_precision_products():
        for chunk in plan.chunks():
            target = target_memory[: chunk.stop - chunk.start].zero_()
            for rows in plan.rows():
                z_student, inverse_student = normalize_into(student_memory, student[chunk, rows])
                z_teacher, inverse_teacher = normalize_into(teacher_memory, teacher[chunk, rows])
                add_upper_gram_(own[chunk], z_student)
                add_upper_gram_(target, z_teacher)
                cross[chunk].baddbmm_(z_teacher.transpose(1, 2), z_student)
                losses[chunk] -= ((inverse_student > 0) != (inverse_teacher > 0)).sum(dim=(1, 2))
            mirror_upper_(own[chunk])
            mirror_upper_(target)
            losses[chunk] += squared_norms(target) - 2 * squared_norms(cross[chunk]) + squared_norms(own[chunk])
    # Rounding may leave a sum that cannot be negative slightly below zero.
    return losses.clamp_min_(0) / (num_tokens * (num_tokens - 1)), cross, own


@_feature_forward.register_fake
def _(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_samples, student_dim, teacher_dim = student.shape[0], student.shape[2], teacher.shape[2]
    dtype = compute_dtype(student, teacher)
    return (
        student.new_empty(num_samples, dtype=dtype),
        student.new_empty(num_samples, teacher_dim, student_dim, dtype=dtype),
        student.new_empty(num_samples, student_dim, student_dim, dtype=dtype),
    )


@torch.library.custom_op("diffusers_srepa::feature_form_mse_backward", mutates_args=())
def _feature_backward(
    grad_losses: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, cross: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """The gradient of the losses, weighted by `grad_losses`, with respect to the raw student tokens."""
    num_tokens = student.shape[1]
    plan = plan_chunks(student, teacher)
    gradient = torch.empty(student.shape, dtype=own.dtype, device=student.device)
    factors = (grad_losses * (4 / (num_tokens * (num_tokens - 1)))).view(-1, 1, 1)
    student_memory, teacher_memory = plan.memory(student, own.dtype), plan.memory(teacher, own.dtype)
    with full_precision_products():
        for chunk in plan.chunks():
            for rows in plan.rows():
                z_student, inverse_student = normalize_into(student_memory, student[chunk, rows])
                z_teacher, _ = normalize_into(teacher_memory, teacher[chunk, rows])
                grad_z = gradient[chunk, rows]
                grad_z.baddbmm_(z_student, own[chunk], beta=0).baddbmm_(z_teacher, cross[chunk], alpha=-1)
                tangent_gradient_(grad_z, z_student, inverse_student * factors[chunk])
    return gradient.to(student.dtype)


_feature_backward.register_fake(empty_gradient)


@contextmanager
def full_precision_products() -> Iterator[None]:
    """Matrix products of float32 tensors in float32, whatever the global settings, which are put back at the end."""
    cuda = torch.backends.cuda.matmul
    if hasattr(cuda, "fp32_precision"):
        # One setting per backend; reading the older ones beside them may raise.
        backends = [cuda, getattr(torch.backends.mkldnn, "matmul", cuda)]
        saved = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, saved, strict=True):
                backend.fp32_precision = precision
        return
    # Before torch 2.9, one setting for all backends; `allow_tf32` shows less of it than there is to put back.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
