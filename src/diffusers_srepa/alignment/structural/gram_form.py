"""Gram-MSE through N x N differences of similarities, half of them: the form for small and medium N.

With `M = S_T - S_S`, diagonal left out, the loss of a sample is `|M|^2 / (N (N - 1))` and its gradient with respect to
the normalised student tokens is `-4 M Z_S / (N (N - 1))`. M is symmetric: the upper tiles are computed, kept for the
backward pass, and used twice there.

TensorFloat-32 products, where the user has switched them on, are used here: an error of M is relative to similarities,
not to sums of their squares as in the feature form, and such products move the gradient by less than tokens that come
in bfloat16 do, at any distance between student and teacher.
"""

from typing import Any

import torch

from diffusers_srepa.alignment.structural.normalize import compute_dtype, normalize_into, tangent_gradient_
from diffusers_srepa.alignment.structural.tiling import add_symmetric_product_, plan_tiles, squared_norms


def gram_form_mse(student_tokens: torch.Tensor, teacher_tokens: torch.Tensor) -> torch.Tensor:
    """Gram-MSE of raw tokens `(B, N, D_S)` and `(B, N, D_T)`, N >= 2: one value per sample, shape `(B,)`.

    Computed in float32, or in float64 if both inputs are float64. Differentiable once, in the student alone.
    """
    return _GramFormMSE.apply(student_tokens, teacher_tokens)


class _GramFormMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        losses, differences = _forward(student, teacher)
        ctx.save_for_backward(student, differences)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor, None]:
        student, differences = ctx.saved_tensors
        return _backward(grad_losses, student, differences), None


@torch.library.custom_op("diffusers_srepa::gram_form_mse", mutates_args=())
def _forward(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


@_forward.register_fake
def _(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_samples = student.shape[0]
    dtype = compute_dtype(student, teacher)
    packed_size = num_samples * plan_tiles(student).packed_size
    return student.new_empty(num_samples, dtype=dtype), student.new_empty(packed_size, dtype=dtype)


@torch.library.custom_op("diffusers_srepa::gram_form_mse_backward", mutates_args=())
def _backward(grad_losses: torch.Tensor, student: torch.Tensor, differences: torch.Tensor) -> torch.Tensor:
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


@_backward.register_fake
def _(grad_losses: torch.Tensor, student: torch.Tensor, differences: torch.Tensor) -> torch.Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)
