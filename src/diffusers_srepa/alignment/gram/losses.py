"""The structural losses on raw tokens: `gram_mse_loss` and `gram_kl_loss`, each in several equivalent forms.

The reference forms, at the end, are what the sREPA paper writes, Algorithm 1 and Eq. 5-8, with no shortcut: they build
every N x N matrix and exist to be read and to test the fast forms against. They differ from the paper's text in one
point: a token with norm below 1e-6 counts as zero (see `normalize.py`).
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.gram.kl import LOWEST_TILED_TEMPERATURE, tiled_gram_kl
from diffusers_srepa.alignment.gram.mse import feature_form_mse, gram_form_mse
from diffusers_srepa.alignment.gram.normalize import compute_dtype, normalize_tokens


MSE_FORMS = ("auto", "gram", "feature", "reference")
KL_FORMS = ("auto", "tiled", "fused", "reference")
KL_REDUCTIONS = ("mean", "batchmean")


def gram_mse_loss(student_tokens: torch.Tensor, teacher_tokens: torch.Tensor, form: str = "auto") -> torch.Tensor:
    """Mean squared difference of the off-diagonal cosine similarities of student and teacher (sREPA Eq. 6).

    Computed outside autocast, in float64 if both inputs are float64 and in float32 otherwise. The teacher is detached.
    A token with norm below 1e-6 counts as zero. All forms but `"reference"` are differentiable once. Float32 products
    follow PyTorch's global setting, except in the feature form, which needs and takes full precision.

    Args:
        student_tokens (`torch.Tensor`): raw tokens of shape `(B, N, D_S)`, any float dtype, N >= 2.
        teacher_tokens (`torch.Tensor`): raw tokens of shape `(B, N, D_T)` on the same device; `D_T` may differ.
        form (`str`): `"auto"` takes the cheaper of `"gram"` (N x N matrices) and `"feature"` (D x D matrices);
            `"reference"` is the plain formula.

    Returns:
        `torch.Tensor`: one value per sample, shape `(B,)`.

    Raises:
        ValueError: the shapes do not fit, there are fewer than two tokens, or `form` is unknown.
    """
    check_choice("form", form, MSE_FORMS)
    check_tokens(student_tokens, teacher_tokens)
    with torch.autocast(device_type=student_tokens.device.type, enabled=False):
        return compute_gram_mse(student_tokens, teacher_tokens.detach(), form)


def compute_gram_mse(student: torch.Tensor, teacher: torch.Tensor, form: str) -> torch.Tensor:
    """`gram_mse_loss` of arguments that are checked, of a teacher that is detached, outside autocast."""
    if form == "auto":
        form = choose_mse_form(student.shape[1], student.shape[2], teacher.shape[2])
    if form == "reference":
        dtype = compute_dtype(student, teacher)
        return reference_gram_mse(student.to(dtype), teacher.to(dtype))
    return gram_form_mse(student, teacher) if form == "gram" else feature_form_mse(student, teacher)


def choose_mse_form(num_tokens: int, student_dim: int, teacher_dim: int) -> str:
    """`"feature"` where the multiplications of forward and backward pass are fewer than those of `"gram"`.

    The Gram form takes `N^2 (D_T + 2 D_S)`, the feature form `N (D_T^2 + 2 D_T D_S + 2 D_S^2)`: at equal widths the
    feature form wins for `N > 5/3 D`. Both save some of them by symmetry.
    """
    feature_cost = teacher_dim**2 + 2 * teacher_dim * student_dim + 2 * student_dim**2
    return "feature" if num_tokens * (teacher_dim + 2 * student_dim) > feature_cost else "gram"


def gram_kl_loss(
    student_tokens: torch.Tensor,
    teacher_tokens: torch.Tensor,
    tau_teacher: float = 0.2,
    tau_student: float = 0.2,
    reduction: str = "mean",
    form: str = "auto",
) -> torch.Tensor:
    """KL divergence between the neighbour distributions of teacher and student (sREPA Eq. 7 and 8).

    Computed outside autocast, in float64 if both inputs are float64 and in float32 otherwise. The teacher is detached.
    A token with norm below 1e-6 counts as zero. All forms but `"reference"` are differentiable once. Float32 products
    follow PyTorch's global setting.

    Args:
        student_tokens (`torch.Tensor`): raw tokens of shape `(B, N, D_S)`, any float dtype, N >= 2.
        teacher_tokens (`torch.Tensor`): raw tokens of shape `(B, N, D_T)` on the same device; `D_T` may differ.
        tau_teacher (`float`): temperature of the teacher's softmax, > 0.
        tau_student (`float`): temperature of the student's softmax, > 0.
        reduction (`str`): `"mean"` over tokens is Eq. 8; `"batchmean"` is the sum over tokens, N times larger, which
            Algorithm 1 computes when taken literally.
        form (`str`): `"tiled"` never builds an N x N matrix and takes temperatures from 1/300; `"fused"` is the same
            with Triton kernels, on CUDA, in float32, at temperatures from 1/40; `"reference"` is the plain formula,
            at any temperature; `"auto"` takes the first that can run of fused, tiled and reference.

    Returns:
        `torch.Tensor`: one value per sample, shape `(B,)`.

    Raises:
        ValueError: the shapes do not fit, there are fewer than two tokens, a temperature is not positive or too low
            for the form, `form` or `reduction` is unknown, or the kernels of `form="fused"` cannot run.
    """
    check_choice("form", form, KL_FORMS)
    check_choice("reduction", reduction, KL_REDUCTIONS)
    check_temperature("tau_teacher", tau_teacher)
    check_temperature("tau_student", tau_student)
    check_tokens(student_tokens, teacher_tokens)
    with torch.autocast(device_type=student_tokens.device.type, enabled=False):
        return compute_gram_kl(student_tokens, teacher_tokens.detach(), tau_teacher, tau_student, reduction, form)


def compute_gram_kl(
    student: torch.Tensor, teacher: torch.Tensor, tau_teacher: float, tau_student: float, reduction: str, form: str
) -> torch.Tensor:
    """`gram_kl_loss` of arguments that are checked, of a teacher that is detached, outside autocast."""
    tau_teacher, tau_student = float(tau_teacher), float(tau_student)
    if form == "reference" or (form == "auto" and min(tau_teacher, tau_student) < LOWEST_TILED_TEMPERATURE):
        dtype = compute_dtype(student, teacher)
        return reference_gram_kl(student.to(dtype), teacher.to(dtype), tau_teacher, tau_student, reduction)
    losses = tiled_gram_kl(student, teacher, tau_teacher, tau_student, form)
    return losses if reduction == "mean" else losses * student.shape[1]


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, but is {value!r}.")


def check_temperature(option: str, value: float) -> None:
    """Raise `ValueError` unless `value` is a positive finite temperature."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{option} must be a positive temperature, but is {value!r}.")


def check_tokens(student_tokens: torch.Tensor, teacher_tokens: torch.Tensor) -> None:
    """Raise `ValueError` unless both are `(B, N, D)` tokens on one device with the same B and the same N >= 2."""
    for name, tokens in (("student_tokens", student_tokens), ("teacher_tokens", teacher_tokens)):
        if not isinstance(tokens, torch.Tensor):
            raise ValueError(
                f"{name} must be a tensor (B, N, D), but is a {type(tokens).__name__}: pass the .tokens of a TokenMap."
            )
        if tokens.ndim != 3:
            raise ValueError(f"{name} must have shape (B, N, D), but has shape {tuple(tokens.shape)}.")
        if not tokens.is_floating_point():
            raise ValueError(f"{name} must be floating point, but has dtype {tokens.dtype}.")
    if student_tokens.shape[:2] != teacher_tokens.shape[:2]:
        raise ValueError(
            f"student_tokens {tuple(student_tokens.shape)} and teacher_tokens {tuple(teacher_tokens.shape)} must "
            "agree in batch size and number of tokens: check the teacher's grid."
        )
    if student_tokens.device != teacher_tokens.device:
        raise ValueError(
            f"student_tokens are on {student_tokens.device} and teacher_tokens on {teacher_tokens.device}: move the "
            "teacher to the student's device."
        )
    if student_tokens.shape[1] < 2:
        raise ValueError(
            f"a structural loss compares pairs of tokens and needs at least 2 of them, but got "
            f"{student_tokens.shape[1]}: use a larger token grid."
        )


def cosine_gram(tokens: torch.Tensor) -> torch.Tensor:
    """Pairwise cosine similarities `(B, N, N)` of raw tokens `(B, N, D)` (Eq. 5)."""
    normalized = normalize_tokens(tokens)
    return torch.bmm(normalized, normalized.transpose(1, 2))


def off_diagonal(matrices: torch.Tensor) -> torch.Tensor:
    """The entries `i != j` of `(B, N, N)` as `(B, N, N - 1)`: the mask of Algorithm 1."""
    batch_size, num_tokens, _ = matrices.shape
    mask = ~torch.eye(num_tokens, dtype=torch.bool, device=matrices.device)
    return matrices[:, mask].reshape(batch_size, num_tokens, num_tokens - 1)


def reference_gram_mse(student_tokens: torch.Tensor, teacher_tokens: torch.Tensor) -> torch.Tensor:
    """Squared difference of the cosine Gram matrices, mean over `i != j` (Eq. 6), per sample; see `gram_mse_loss`."""
    student = off_diagonal(cosine_gram(student_tokens))
    teacher = off_diagonal(cosine_gram(teacher_tokens.detach()))
    return (teacher - student).square().mean(dim=(1, 2))


def reference_gram_kl(
    student_tokens: torch.Tensor,
    teacher_tokens: torch.Tensor,
    tau_teacher: float = 0.2,
    tau_student: float = 0.2,
    reduction: str = "mean",
) -> torch.Tensor:
    """KL divergence of the student's neighbour distribution from the teacher's (Eq. 7 and 8), see `gram_kl_loss`.

    The reduction `"batchmean"` sums over tokens, as that of this name does to the three-dimensional input of
    Algorithm 1.
    """
    teacher = off_diagonal(cosine_gram(teacher_tokens.detach()))
    student = off_diagonal(cosine_gram(student_tokens))
    teacher_probabilities = F.softmax(teacher / tau_teacher, dim=-1)
    student_log_probabilities = F.log_softmax(student / tau_student, dim=-1)
    divergence = F.kl_div(student_log_probabilities, teacher_probabilities, reduction="none").sum(dim=-1)
    return divergence.mean(dim=1) if reduction == "mean" else divergence.sum(dim=1)
