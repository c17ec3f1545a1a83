"""The structural losses as the sREPA paper writes them: Algorithm 1 and Eq. 5-8, with no shortcut.

These forms build every N x N matrix and exist to be read and to test the fast forms against. They compute in the dtype
of their inputs and differ from the paper's text in one point: a token with norm below 1e-6 counts as zero (see
`normalize.py`). The teacher is detached in all of them.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.gram.normalize import normalize_tokens


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
