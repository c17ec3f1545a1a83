"""Gram-KL in tiles: exact, with no N x N matrix.

With logits `l = S / tau`, diagonal left out, and `e_i = log sum_j exp l_ij`, the divergence of row i is
`sum_j P^T_ij (l^T_ij - l^S_ij) - e^T_i + e^S_i`. Its gradient with respect to the student's similarities is
`G = (P^S - P^T) / tau_s`, and `(G + G') Z_S` with respect to the normalised tokens: a symmetric matrix times tokens.
Both passes walk the upper tiles alone. The forward pass keeps e^T and e^S; the backward pass computes tiles again.
"""

from typing import Any

import torch

from diffusers_srepa.alignment.structural.normalize import compute_dtype, normalize_into, tangent_gradient_
from diffusers_srepa.alignment.structural.tiling import RowTile, add_symmetric_product_, plan_tiles


def tiled_gram_kl(
    student_tokens: torch.Tensor, teacher_tokens: torch.Tensor, tau_teacher: float, tau_student: float
) -> torch.Tensor:
    """Gram-KL (Eq. 8, mean over tokens) of raw tokens `(B, N, D_S)` and `(B, N, D_T)`, N >= 2: shape `(B,)`.

    Computed in float32, or in float64 if both inputs are float64. Differentiable once, in the student alone. Keeps
    `2 B N` numbers for the backward pass; each pass needs normalised tokens and a few tiles besides.
    """
    return _TiledGramKL.apply(student_tokens, teacher_tokens, tau_teacher, tau_student)


class _TiledGramKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, tau_teacher: float, tau_student: float
    ) -> torch.Tensor:
        losses, normalizers = _forward(student, teacher, tau_teacher, tau_student)
        ctx.save_for_backward(student, teacher, normalizers)
        ctx.temperatures = (tau_teacher, tau_student)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _backward(grad_losses, *ctx.saved_tensors, *ctx.temperatures), None, None, None


@torch.library.custom_op("diffusers_srepa::tiled_gram_kl", mutates_args=())
def _forward(
    student: torch.Tensor, teacher: torch.Tensor, tau_teacher: float, tau_student: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `(B,)` and the log-sum-exps of teacher and student rows, shape `(2, B, N)`."""
    num_samples, num_tokens, _ = student.shape
    dtype = compute_dtype(student, teacher)
    plan = plan_tiles(student)
    losses = student.new_empty(num_samples, dtype=dtype)
    normalizers = student.new_empty(2, num_samples, num_tokens, dtype=dtype)
    student_memory = losses.new_empty(plan.chunk_size, num_tokens, student.shape[2])
    teacher_memory = losses.new_empty(plan.chunk_size, num_tokens, teacher.shape[2])
    scratch = losses.new_empty(4, plan.tile_size)
    for chunk in plan.chunks():
        z_student, _ = normalize_into(student_memory, student[chunk])
        z_teacher, _ = normalize_into(teacher_memory, teacher[chunk])
        sums = _RunningSums(z_student, scratch[2:])
        for tile in plan.tiles():
            teacher_logits = _logits(scratch[0], z_teacher, tile, tau_teacher)
            student_logits = _logits(scratch[1], z_student, tile, tau_student)
            sums.add(tile.rows, teacher_logits, student_logits, dim=2)
            right = slice(tile.num_rows, None)
            if tile.stop < num_tokens:
                sums.add(slice(tile.stop, num_tokens), teacher_logits[:, :, right], student_logits[:, :, right], dim=1)
        normalizers[0, chunk], normalizers[1, chunk], divergences = sums.finish()
        losses[chunk] = divergences.mean(dim=1)
    return losses, normalizers


@_forward.register_fake
def _(
    student: torch.Tensor, teacher: torch.Tensor, tau_teacher: float, tau_student: float
) -> tuple[torch.Tensor, torch.Tensor]:
    num_samples, num_tokens, _ = student.shape
    dtype = compute_dtype(student, teacher)
    return student.new_empty(num_samples, dtype=dtype), student.new_empty(2, num_samples, num_tokens, dtype=dtype)


@torch.library.custom_op("diffusers_srepa::tiled_gram_kl_backward", mutates_args=())
def _backward(
    grad_losses: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    normalizers: torch.Tensor,
    tau_teacher: float,
    tau_student: float,
) -> torch.Tensor:
    """The gradient of the losses, weighted by `grad_losses`, with respect to the raw student tokens."""
    num_samples, num_tokens, _ = student.shape
    plan = plan_tiles(student)
    gradient = torch.empty(student.shape, dtype=normalizers.dtype, device=student.device)
    factors = (grad_losses / (num_tokens * tau_student)).view(-1, 1, 1)
    student_memory = gradient.new_empty(plan.chunk_size, num_tokens, student.shape[2])
    teacher_memory = gradient.new_empty(plan.chunk_size, num_tokens, teacher.shape[2])
    scratch = gradient.new_empty(3, plan.tile_size)
    for chunk in plan.chunks():
        z_student, inverse = normalize_into(student_memory, student[chunk])
        z_teacher, _ = normalize_into(teacher_memory, teacher[chunk])
        for tile in plan.tiles():
            logits = _logits(scratch[0], z_student, tile, tau_student)
            block = _summed_probabilities(scratch[1], logits, normalizers[1, chunk], tile)
            logits = _logits(scratch[0], z_teacher, tile, tau_teacher)
            block -= _summed_probabilities(scratch[2], logits, normalizers[0, chunk], tile)
            add_symmetric_product_(gradient[chunk], block, z_student, tile)
        tangent_gradient_(gradient[chunk], z_student, inverse * factors[chunk])
    return gradient.to(student.dtype)


@_backward.register_fake
def _(
    grad_losses: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    normalizers: torch.Tensor,
    tau_teacher: float,
    tau_student: float,
) -> torch.Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _logits(scratch: torch.Tensor, normalized: torch.Tensor, tile: RowTile, tau: float) -> torch.Tensor:
    """Similarities of a tile divided by the temperature; the diagonal is the lowest finite number, so that differences
    of two of them and their products with a probability of 0 stay numbers."""
    logits = tile.of_scratch(scratch, len(normalized))
    torch.bmm(normalized[:, tile.rows], normalized[:, tile.columns].transpose(1, 2), out=logits).div_(tau)
    logits.diagonal(dim1=1, dim2=2).fill_(torch.finfo(logits.dtype).min)
    return logits


def _summed_probabilities(
    scratch: torch.Tensor, logits: torch.Tensor, normalizers: torch.Tensor, tile: RowTile
) -> torch.Tensor:
    """`P_ij + P_ji` on a tile, from its logits, which are overwritten, and the log-sum-exps `(B, N)` of all rows."""
    by_row = torch.sub(logits, normalizers[:, tile.rows].unsqueeze(2), out=tile.of_scratch(scratch, len(logits)))
    by_column = logits.sub_(normalizers[:, tile.columns].unsqueeze(1))
    return by_row.exp_().add_(by_column.exp_())


class _RunningSums:
    """Per row: maximum and sum of exponentials for teacher and student, and `sum_j exp(l^T) (l^T - l^S)`.

    Sums are relative to the running maximum and are rescaled when it rises, which is safe at any temperature.
    """

    def __init__(self, normalized: torch.Tensor, scratch: torch.Tensor) -> None:
        self.scratch = scratch
        shape = normalized.shape[:2]
        lowest = torch.finfo(normalized.dtype).min
        self.teacher_max, self.student_max = normalized.new_full(shape, lowest), normalized.new_full(shape, lowest)
        self.teacher_sum, self.student_sum = normalized.new_zeros(shape), normalized.new_zeros(shape)
        self.weighted_gap = normalized.new_zeros(shape)

    def add(self, rows: slice, teacher_logits: torch.Tensor, student_logits: torch.Tensor, dim: int) -> None:
        """Add logits of `rows`, whose other tokens run along `dim`."""
        rescale, terms = self._raise_maximum(self.teacher_max[:, rows], teacher_logits, dim)
        self.teacher_sum[:, rows].mul_(rescale).add_(terms.sum(dim))
        gap = torch.sub(teacher_logits, student_logits, out=self._memory(1, teacher_logits)).mul_(terms)
        self.weighted_gap[:, rows].mul_(rescale).add_(gap.sum(dim))
        rescale, terms = self._raise_maximum(self.student_max[:, rows], student_logits, dim)
        self.student_sum[:, rows].mul_(rescale).add_(terms.sum(dim))

    def _raise_maximum(
        self, maximum: torch.Tensor, logits: torch.Tensor, dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise `maximum` to that of the logits: the factor for earlier sums, and `exp(logits - maximum)`."""
        raised = torch.maximum(maximum, logits.amax(dim))
        rescale = (maximum - raised).exp_()
        maximum.copy_(raised)
        return rescale, torch.sub(logits, raised.unsqueeze(dim), out=self._memory(0, logits)).exp_()

    def _memory(self, index: int, logits: torch.Tensor) -> torch.Tensor:
        return self.scratch[index, : logits.numel()].view(logits.shape)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-sum-exps of teacher and student and the divergence of each row, each `(B, N)`."""
        teacher = self.teacher_max + self.teacher_sum.log()
        student = self.student_max + self.student_sum.log()
        return teacher, student, self.weighted_gap / self.teacher_sum - teacher + student
