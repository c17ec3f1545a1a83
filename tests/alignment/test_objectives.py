"""The interface of objectives, and the three that the methods of the paper use."""

import pytest
import torch

from diffusers_srepa.alignment.gram.losses import gram_kl_loss, gram_mse_loss
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramKLAlignment, GramMSEAlignment
from diffusers_srepa.tokens import TokenMap


OBJECTIVES = [CosineAlignment(), GramMSEAlignment(), GramKLAlignment()]


def random_map(*shape: int, grid: tuple[int, int], prefix: int = 0, seed: int = 0, dtype=torch.float64) -> TokenMap:
    generator = torch.Generator().manual_seed(seed)
    return TokenMap(torch.randn(*shape, generator=generator, dtype=dtype), grid, prefix)


def golden_maps() -> tuple[TokenMap, TokenMap]:
    b = torch.arange(2, dtype=torch.float64).view(2, 1, 1)
    t = torch.arange(16, dtype=torch.float64).view(1, 16, 1)
    d = torch.arange(8, dtype=torch.float64).view(1, 1, 8)
    teacher = torch.sin(0.1 * (t + 1) * (d + 1) + b)
    student = torch.cos(0.13 * (t + 1) * (d + 1) + 0.5 * b + 0.2 * t)
    return TokenMap(student, (4, 4)), TokenMap(teacher, (4, 4))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (CosineAlignment(), 0.14118673),
        (GramMSEAlignment(), 0.15648402),
        (GramKLAlignment(), 0.51156789),
        (GramKLAlignment(0.2, 0.4), 0.50942581),
        (GramKLAlignment(reduction="batchmean"), 8.18508619),
    ],
)
def test_golden_values(objective, expected):
    value = objective(*golden_maps())
    assert objective.scope == "sample"
    assert value.shape == (2,)
    assert value.dtype == torch.float64
    assert value.mean().item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_each_sample_has_its_own_value(objective):
    student, teacher = random_map(3, 6, 4, grid=(2, 3)), random_map(3, 6, 4, grid=(2, 3), seed=1)
    together = objective(student, teacher)
    for index in range(3):
        one = slice(index, index + 1)
        alone = objective(TokenMap(student.tokens[one], (2, 3)), TokenMap(teacher.tokens[one], (2, 3)))
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_float32_even_under_autocast_and_for_low_precision_input(objective):
    student = random_map(2, 6, 16, grid=(2, 3), dtype=torch.bfloat16)
    teacher = random_map(2, 6, 16, grid=(2, 3), seed=1, dtype=torch.float32)
    student.tokens.requires_grad_()
    plain = objective(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = objective(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, plain)
    expected = objective(
        student.detach().with_tokens(student.tokens.detach().double()), teacher.with_tokens(teacher.tokens.double())
    )
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-4)
    value.sum().backward()
    assert student.tokens.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_target_gets_no_gradient(objective):
    student, teacher = random_map(1, 4, 5, grid=(2, 2)), random_map(1, 4, 5, grid=(2, 2), seed=1)
    student.tokens.requires_grad_()
    teacher.tokens.requires_grad_()
    objective(student, teacher).sum().backward()
    assert student.tokens.grad.abs().sum() > 0
    assert teacher.tokens.grad is None


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_zero_tokens_are_finite_with_zero_gradient(objective):
    student, teacher = random_map(1, 6, 5, grid=(2, 3)), random_map(1, 6, 5, grid=(2, 3), seed=1)
    student.tokens[0, 2] = 0.0
    student.tokens[0, 4] *= 1e-8
    teacher.tokens[0, 3] = 0.0
    student.tokens.requires_grad_()
    value = objective(student, teacher)
    value.sum().backward()
    assert torch.isfinite(value).all()
    gradient = student.tokens.grad[0]
    assert gradient[2].abs().max() == 0 and gradient[4].abs().max() == 0
    assert gradient[0].abs().max() > 0 and gradient.abs().max() < 10


def test_cosine_by_hand():
    student = TokenMap(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]), (1, 2))
    target = TokenMap(torch.tensor([[[1.0, 1.0], [0.0, -7.0]]]), (1, 2))
    assert CosineAlignment()(student, target).item() == pytest.approx((-(0.5**0.5) + 1.0) / 2, abs=1e-6)


@pytest.mark.parametrize("objective_class", [CosineAlignment, GramMSEAlignment, GramKLAlignment])
def test_prefix_tokens_can_be_left_out(objective_class):
    student = random_map(2, 7, 5, grid=(2, 3), prefix=1)
    target = random_map(2, 7, 5, grid=(2, 3), prefix=1, seed=1)
    with_prefix = objective_class()(student, target)
    without = objective_class(include_prefix_tokens=False)(student, target)
    assert not torch.allclose(with_prefix, without)
    torch.testing.assert_close(without, objective_class()(student.without_prefix(), target.without_prefix()))
    # A student with a class token against a teacher without one: only the patches can be compared.
    torch.testing.assert_close(without, objective_class(include_prefix_tokens=False)(student, target.without_prefix()))


def test_gram_objectives_take_other_widths_and_pass_their_options_on():
    student, target = random_map(2, 6, 5, grid=(2, 3)), random_map(2, 6, 9, grid=(2, 3), seed=1)
    torch.testing.assert_close(GramMSEAlignment()(student, target), gram_mse_loss(student.tokens, target.tokens))
    torch.testing.assert_close(
        GramKLAlignment(0.3, 0.7, "batchmean", "reference")(student, target),
        gram_kl_loss(student.tokens, target.tokens, 0.3, 0.7, "batchmean", "reference"),
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_clear_errors(objective):
    student = random_map(2, 6, 5, grid=(2, 3))
    with pytest.raises(ValueError, match="got none"):
        objective(student, None)
    with pytest.raises(ValueError, match="2 x 3 .* 3 x 2"):
        objective(student, random_map(2, 6, 5, grid=(3, 2)))
    with pytest.raises(ValueError, match="grid is 2 x 3"):
        objective(student, random_map(2, 4, 5, grid=(2, 2)))
    with pytest.raises(ValueError, match="batch sizes are 2 and 3"):
        objective(student, random_map(3, 6, 5, grid=(2, 3)))
    with pytest.raises(ValueError, match="include_prefix_tokens"):
        objective(student, random_map(2, 7, 5, grid=(2, 3), prefix=1))


def test_clear_errors_of_single_objectives():
    one, other = random_map(2, 1, 5, grid=(1, 1)), random_map(2, 1, 5, grid=(1, 1), seed=1)
    for objective in (GramMSEAlignment(), GramKLAlignment()):
        with pytest.raises(ValueError, match="at least 2 tokens"):
            objective(one, other)
    assert CosineAlignment()(one, other).shape == (2,)
    with pytest.raises(ValueError, match="out_dim=9"):
        CosineAlignment()(random_map(2, 6, 5, grid=(2, 3)), random_map(2, 6, 9, grid=(2, 3)))
    with pytest.raises(ValueError, match="tau_student"):
        GramKLAlignment(tau_student=0.0)
    with pytest.raises(ValueError, match="reduction"):
        GramKLAlignment(reduction="sum")
    with pytest.raises(ValueError, match="form"):
        GramMSEAlignment(form="fast")


def test_raw_token_functions_check_their_input():
    tokens = torch.randn(2, 6, 5)
    for loss in (gram_mse_loss, gram_kl_loss):
        with pytest.raises(ValueError, match="shape"):
            loss(tokens[0], tokens[0])
        with pytest.raises(ValueError, match="number of tokens"):
            loss(tokens, tokens[:, :5])
        with pytest.raises(ValueError, match="batch size"):
            loss(tokens, tokens[:1])
        with pytest.raises(ValueError, match="at least 2"):
            loss(tokens[:, :1], tokens[:, :1])
        with pytest.raises(ValueError, match="on cpu and teacher_tokens on meta"):
            loss(tokens, tokens.to("meta"))
        with pytest.raises(ValueError, match="floating point"):
            loss(tokens.long(), tokens)
        with pytest.raises(ValueError, match="form"):
            loss(tokens, tokens, form="fast")
    with pytest.raises(ValueError, match="tau_teacher"):
        gram_kl_loss(tokens, tokens, tau_teacher=-1.0)
    with pytest.raises(ValueError, match="reduction"):
        gram_kl_loss(tokens, tokens, reduction="sum")
