"""The structural losses against the published golden values and the printed Algorithm 1."""

import math

import pytest
import torch

from diffusers_srepa.alignment.gram.losses import gram_kl_loss, gram_mse_loss
from tests.helpers.algorithm_1 import algorithm_1


MSE_FORMS = ["reference", "gram", "feature", "auto"]
KL_FORMS = ["reference", "tiled", "auto"]


def golden_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher of the golden losses: B = 2, N = 16, D = 8, float64."""
    b = torch.arange(2, dtype=torch.float64).view(2, 1, 1)
    t = torch.arange(16, dtype=torch.float64).view(1, 16, 1)
    d = torch.arange(8, dtype=torch.float64).view(1, 1, 8)
    teacher = torch.sin(0.1 * (t + 1) * (d + 1) + b)
    student = torch.cos(0.13 * (t + 1) * (d + 1) + 0.5 * b + 0.2 * t)
    return student, teacher


@pytest.mark.parametrize("form", MSE_FORMS)
def test_golden_mse(form):
    student, teacher = golden_tokens()
    value = gram_mse_loss(student, teacher, form=form)
    assert value.shape == (2,)
    assert value.mean().item() == pytest.approx(0.15648402, abs=1e-8)


@pytest.mark.parametrize("form", KL_FORMS)
@pytest.mark.parametrize(
    ("tau_student", "reduction", "expected"),
    [
        (0.2, "mean", 0.51156789),
        (0.2, "batchmean", 8.18508619),
        (0.4, "mean", 0.50942581),
        (0.4, "batchmean", 8.15081291),
    ],
)
def test_golden_kl(form, tau_student, reduction, expected):
    student, teacher = golden_tokens()
    value = gram_kl_loss(student, teacher, 0.2, tau_student, reduction=reduction, form=form)
    assert value.shape == (2,)
    assert value.mean().item() == pytest.approx(expected, abs=1e-7)


def test_algorithm_1_is_the_batch_mean_of_the_losses():
    student, teacher = golden_tokens()
    projection, mse = algorithm_1(student, teacher, "mse")
    _, kl = algorithm_1(student, teacher, "kl", tau_teacher=0.2, tau_student=0.4)
    assert projection.item() == pytest.approx(0.14118673, abs=1e-8)
    assert mse.item() == pytest.approx(0.15648402, abs=1e-8)
    assert kl.item() == pytest.approx(8.15081291, abs=1e-7)


def test_mse_by_hand():
    """Two tokens: one off-diagonal pair, cosines 0 (student) and 1/sqrt(2) (teacher)."""
    student = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    teacher = torch.tensor([[[1.0, 0.0, 0.0], [5.0, 5.0, 0.0]]])
    for form in MSE_FORMS:
        assert gram_mse_loss(student, teacher, form=form).item() == pytest.approx(0.5, abs=1e-6)


def test_kl_by_hand():
    """Three tokens: with the diagonal left out each row is a distribution over two neighbours."""
    student = torch.eye(3).unsqueeze(0)
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    # Student rows are uniform. Teacher rows 0 and 1 hold cosines (1, 0), row 2 (0, 0): with tau 0.5 logits (2, 0).
    p = math.exp(2.0) / (math.exp(2.0) + 1.0)
    row = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    for form in KL_FORMS:
        assert gram_kl_loss(student, teacher, 0.5, 0.2, form=form).item() == pytest.approx(2 * row / 3, abs=1e-6)
        total = gram_kl_loss(student, teacher, 0.5, 0.2, reduction="batchmean", form=form).item()
        assert total == pytest.approx(2 * row, abs=1e-6)
