"""Every objective, value and gradient, against its definition written down with other operations, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.registry import OBJECTIVES, build_objective
from diffusers_srepa.tokens import TokenMap


Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gram(tokens: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of the tokens of one sample, (N, N)."""
    return F.cosine_similarity(tokens[:, None], tokens[None, :], dim=-1)


def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    """(N, N) to (N, N - 1)."""
    size = len(matrix)
    return matrix[~torch.eye(size, dtype=torch.bool)].view(size, size - 1)


def cosine(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return -F.cosine_similarity(s, t, dim=-1).mean()


def gram_mse(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(off_diagonal(gram(s)), off_diagonal(gram(t)))


def gram_kl(tau_teacher: float, tau_student: float) -> Formula:
    def formula(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        teacher = F.softmax(off_diagonal(gram(t)) / tau_teacher, dim=1)
        student = F.softmax(off_diagonal(gram(s)) / tau_student, dim=1)
        return (teacher * (teacher.log() - student.log())).sum(dim=1).mean()

    return formula


def literal_gram_kl(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return len(s) * gram_kl(0.2, 0.2)(s, t)


def positive_gram(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(F.relu(gram(s)), F.relu(gram(t)))


def teacher_positive_gram(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(gram(s), F.relu(gram(t)))


def distance_margin(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    excess = (gram(s) - gram(t)).abs() - 0.25
    return torch.where(excess > 0, excess, 0.0).mean()


def rkd_distance(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    ours, theirs = F.pdist(s), F.pdist(t)
    return F.smooth_l1_loss(ours / ours.mean(), theirs / theirs.mean())


def cka(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    centring = torch.eye(len(s), dtype=s.dtype) - 1 / len(s)
    k, m = (centring @ x @ x.T @ centring for x in (s, t))
    return 1 - torch.trace(k @ m) / (torch.trace(k @ k) * torch.trace(m @ m)).sqrt()


def batch_cka(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return cka(s.flatten(1), t.flatten(1))


def similarity_preserving(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    ours, theirs = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (s, t))
    return torch.linalg.norm(ours - theirs) ** 2 / len(s) ** 2


def dispersive(tau: float) -> Formula:
    def formula(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        distances = F.pdist(s.flatten(1)) ** 2 / s[0].numel()
        pairs = torch.cat([distances, distances, distances.new_zeros(len(s))])
        return (-pairs / tau).exp().mean().log()

    return formula


# literal -> the formula of one sample (N, D), or of the whole batch (B, N, D)
SAMPLE: list[tuple[dict[str, object], Formula]] = [
    ({"name": "cosine"}, cosine),
    ({"name": "layer_sync"}, cosine),
    ({"name": "gram_mse"}, gram_mse),
    ({"name": "gram_mse", "form": "gram"}, gram_mse),
    ({"name": "gram_mse", "form": "feature"}, gram_mse),
    ({"name": "gram_kl"}, gram_kl(0.2, 0.2)),
    ({"name": "gram_kl", "tau_teacher": 0.1, "tau_student": 0.5}, gram_kl(0.1, 0.5)),
    ({"name": "gram_kl", "reduction": "batchmean"}, literal_gram_kl),
    ({"name": "positive_gram"}, positive_gram),
    ({"name": "positive_gram", "remove": "teacher"}, teacher_positive_gram),
    ({"name": "distance_margin"}, distance_margin),
    ({"name": "rkd_distance"}, rkd_distance),
    ({"name": "cka"}, cka),
]
BATCH: list[tuple[dict[str, object], Formula]] = [
    ({"name": "batch_cka"}, batch_cka),
    ({"name": "similarity_preserving"}, similarity_preserving),
    ({"name": "dispersive"}, dispersive(1.0)),
    ({"name": "dispersive", "tau": 0.5}, dispersive(0.5)),
]


def describe(value: object) -> str:
    return str(value) if isinstance(value, dict) else ""


def test_every_objective_has_a_formula_here() -> None:
    assert {literal["name"] for literal, _ in SAMPLE + BATCH} == set(OBJECTIVES)


def draw(width: int, seed: int) -> torch.Tensor:
    """Four samples of a class token and 3 x 4 patch tokens."""
    return torch.randn(4, 13, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def compare(literal: dict[str, object], with_prefix: bool, expect: Formula) -> None:
    objective = build_objective({**literal, "include_prefix_tokens": with_prefix})
    student, target = draw(7, 0).requires_grad_(), draw(7, 1)
    value = objective(TokenMap(student, (3, 4), 1), TokenMap(target, (3, 4), 1))
    start = 0 if with_prefix else 1
    expected = expect(student[:, start:], target[:, start:])

    assert value.dtype == torch.float64 and value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    factors = torch.arange(1.0, 5.0, dtype=torch.float64) if value.ndim else torch.tensor(1.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((value * factors).sum(), student, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad((expected * factors).sum(), student)
    assert expected_gradient.abs().max() > 1e-5
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize(("literal", "formula"), SAMPLE, ids=describe)
def test_samples(literal: dict[str, object], formula: Formula, with_prefix: bool) -> None:
    def expect(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.stack([formula(s, t) for s, t in zip(student, target, strict=True)])

    assert OBJECTIVES[str(literal["name"])].scope == "sample"
    compare(literal, with_prefix, expect)


@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize(("literal", "formula"), BATCH, ids=describe)
def test_batches(literal: dict[str, object], formula: Formula, with_prefix: bool) -> None:
    assert OBJECTIVES[str(literal["name"])].scope == "batch"
    compare(literal, with_prefix, formula)
