"""The exact forms of the structural losses against the plain reference forms."""

import pytest
import torch

from diffusers_srepa.alignment.gram import tiles
from diffusers_srepa.alignment.gram.losses import (
    choose_mse_form,
    cosine_gram,
    gram_kl_loss,
    gram_mse_loss,
    reference_gram_kl,
    reference_gram_mse,
)


NUM_TOKENS = [2, 3, 7, 16, 33, 64, 129, 256, 1024, pytest.param(4096, marks=pytest.mark.slow)]

LOSSES = {
    "gram": (lambda s, t: gram_mse_loss(s, t, form="gram"), reference_gram_mse),
    "feature": (lambda s, t: gram_mse_loss(s, t, form="feature"), reference_gram_mse),
    "kl": (gram_kl_loss, reference_gram_kl),
    "kl-temperatures": (lambda s, t: gram_kl_loss(s, t, 0.1, 0.7), lambda s, t: reference_gram_kl(s, t, 0.1, 0.7)),
    "kl-cold": (lambda s, t: gram_kl_loss(s, t, 0.004, 0.01), lambda s, t: reference_gram_kl(s, t, 0.004, 0.01)),
    "kl-batchmean": (
        lambda s, t: gram_kl_loss(s, t, reduction="batchmean"),
        lambda s, t: reference_gram_kl(s, t, reduction="batchmean"),
    ),
}


def random_tokens(batch, num_tokens, student_dim, teacher_dim, dtype=torch.float64, seed=0):
    """Tokens of different lengths that are not centred, as real features are not."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = (draw(batch, num_tokens, student_dim) + 0.5) * draw(batch, num_tokens, 1).exp()
    teacher = (draw(batch, num_tokens, teacher_dim) + 0.3) * draw(batch, num_tokens, 1).exp()
    return student.to(dtype), teacher.to(dtype)


def value_and_gradient(loss, student, teacher):
    """Values `(B,)` and the gradient of their sum weighted by 1, 2, ..., so that samples do not hide one another."""
    student = student.detach().clone().requires_grad_()
    values = loss(student, teacher)
    (values * torch.arange(1, len(values) + 1, dtype=values.dtype)).sum().backward()
    return values.detach(), student.grad


def assert_agrees(name, student, teacher, tolerance=1e-12):
    exact, reference = LOSSES[name]
    values, gradient = value_and_gradient(exact, student, teacher)
    expected_values, expected_gradient = value_and_gradient(reference, student, teacher)
    assert (values - expected_values).abs().max() <= tolerance * max(1.0, expected_values.abs().max().item())
    assert (gradient - expected_gradient).abs().max() <= tolerance * max(1.0, expected_gradient.abs().max().item())
    # The gradient of a mean over many tokens is small: it must also agree relative to its own size.
    assert (gradient - expected_gradient).norm() <= 1e3 * tolerance * expected_gradient.norm() + 1e-13
    return values, gradient


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_reference(name, num_tokens):
    batch = 3 if num_tokens < 1024 else 1
    student, teacher = random_tokens(batch, num_tokens, 11, 6)
    assert_agrees(name, student, teacher)


@pytest.mark.parametrize("dims", [(1, 1), (5, 5), (3, 40), (300, 260)])
@pytest.mark.parametrize("name", ["gram", "feature", "kl"])
def test_agrees_at_any_widths(name, dims):
    assert_agrees(name, *random_tokens(2, 20, *dims))


@pytest.mark.parametrize("num_tokens", [2, 7, 64, 150])
@pytest.mark.parametrize("name", LOSSES)
def test_zero_and_repeated_tokens(name, num_tokens):
    student, teacher = random_tokens(5, num_tokens, 9, 6)
    student[0, 1] = 0.0  # zero in the student alone
    teacher[1, 0] = 0.0  # zero in the teacher alone
    student[2, 1], teacher[2, 1] = 0.0, 0.0  # in both
    student[3, 1] = 3 * student[3, 0]  # repeated up to length
    teacher[3] = teacher[3, :1]  # all tokens alike
    student[4] = 0.0  # nothing but zeros
    student[0, 0] *= 1e-9 / student[0, 0].norm()  # so short that it counts as zero
    _, gradient = assert_agrees(name, student, teacher)
    assert torch.isfinite(gradient).all()
    assert gradient[0, :2].abs().max() == 0
    assert gradient[4].abs().max() == 0


@pytest.mark.parametrize("name", ["gram", "feature", "kl"])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_any_tiling_gives_the_same(name, rows, monkeypatch):
    """Uneven tiles, last tiles of one row, chunks of one or a few samples, and blocks of a few columns."""
    monkeypatch.setattr(tiles, "CPU_TILE_ROWS", rows)
    monkeypatch.setattr(tiles, "GRAM_BLOCK", 3)
    student, teacher = random_tokens(5, 21, 8, 7)
    student[1, 20] = 0.0
    for elements in (1, 2 * rows * 21, 1000):
        monkeypatch.setattr(tiles, "CPU_TILE_ELEMENTS", elements)
        monkeypatch.setattr(tiles, "CPU_CHUNK_ELEMENTS", elements)
        assert_agrees(name, student, teacher)


def test_packed_size_is_that_of_all_tiles():
    for num_tokens in (2, 3, 127, 128, 129, 255, 256, 300, 1024):
        plan = tiles.plan_tiles(torch.empty(2, num_tokens, 3))
        walk = list(plan.tiles())
        assert plan.packed_size == sum(tile.size for tile in walk)
        assert plan.tile_size >= max(tile.size for tile in walk)
        assert [tile.start for tile in walk] == [0] + [tile.stop for tile in walk[:-1]]
        assert walk[-1].stop == num_tokens


@pytest.mark.parametrize("name", ["gram", "feature", "kl"])
@pytest.mark.parametrize("num_tokens", [2, 5, 9])
def test_gradcheck(name, num_tokens, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_ROWS", 4)
    student, teacher = random_tokens(2, num_tokens, 4, 3)
    exact = LOSSES[name][0]
    assert torch.autograd.gradcheck(lambda s: exact(s, teacher), (student.requires_grad_(),), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["gram", "feature", "kl"])
def test_second_derivatives_are_refused(name):
    """A silent zero in a gradient penalty would be worse than the error."""
    student, teacher = random_tokens(2, 5, 4, 3)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name][0](student, teacher).sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("num_tokens", [16, 256, 1024])
@pytest.mark.parametrize("closeness", [0.0, 0.999])
def test_float32_error(num_tokens, closeness):
    """Against float64: the feature form within 1e-5 (|S_T|^2 + |S_S|^2) / (N (N - 1)), the Gram form relative to the
    loss, which for a student close to its teacher is far smaller."""
    student, teacher = random_tokens(2, num_tokens, 48, 48)
    student = closeness * teacher + (1 - closeness) * student
    expected, expected_gradient = value_and_gradient(reference_gram_mse, student, teacher)
    pairs = num_tokens * (num_tokens - 1)
    energy = sum(cosine_gram(tokens).square().sum(dim=(1, 2)) for tokens in (student, teacher))
    for form, bound, gradient_bound in (("gram", 1e-3 * expected, 1e-3), ("feature", 1e-5 * energy / pairs, None)):
        value, gradient = value_and_gradient(
            lambda s, t, form=form: gram_mse_loss(s, t, form=form), student.float(), teacher.float()
        )
        assert value.dtype == gradient.dtype == torch.float32
        assert ((value - expected).abs() <= bound).all(), form
        if gradient_bound is not None:
            assert (gradient - expected_gradient).norm() <= gradient_bound * expected_gradient.norm()


@pytest.mark.parametrize("name", ["gram", "feature", "kl"])
def test_float32_gradients(name):
    student, teacher = random_tokens(2, 300, 48, 32)
    exact, reference = LOSSES[name]
    values, gradient = value_and_gradient(exact, student.float(), teacher.float())
    expected_values, expected_gradient = value_and_gradient(reference, student, teacher)
    torch.testing.assert_close(values.double(), expected_values, rtol=1e-5, atol=1e-7)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("taus", [(0.2, 0.2), (0.025, 0.03), (0.01, 0.2), (0.2, 0.005), (1e-3, 0.1)])
def test_float32_kl_at_low_temperatures(taus):
    """Tokens between parallel and opposite, so that the logits cover all that a temperature allows."""
    student, teacher = random_tokens(2, 40, 3, 2)
    values, gradient = value_and_gradient(lambda s, t: gram_kl_loss(s, t, *taus), student.float(), teacher.float())
    expected_values, expected_gradient = value_and_gradient(
        lambda s, t: reference_gram_kl(s, t, *taus), student.float().double(), teacher.float().double()
    )
    assert values.dtype == gradient.dtype == torch.float32
    # Without the tiled form's float64, a rounding error of a cosine is divided by the temperature.
    tolerance = 1e-5 if min(taus) > 1e-3 else 1e-3
    torch.testing.assert_close(values.double(), expected_values, rtol=tolerance, atol=1e-6)
    assert (gradient - expected_gradient).norm() <= 10 * tolerance * expected_gradient.norm()


def test_too_low_a_temperature_for_tiles():
    student, teacher = random_tokens(2, 20, 8, 8)
    with pytest.raises(ValueError, match="at least 0.0033"):
        gram_kl_loss(student, teacher, 0.2, 0.003, form="tiled")
    expected = reference_gram_kl(student, teacher, 0.2, 0.003)
    torch.testing.assert_close(gram_kl_loss(student, teacher, 0.2, 0.003), expected)


def test_a_student_equal_to_its_teacher():
    tokens, _ = random_tokens(2, 200, 16, 1, dtype=torch.float32)
    for name in ("gram", "feature", "kl"):
        values, gradient = value_and_gradient(LOSSES[name][0], tokens, tokens)
        assert (values.abs() < 1e-6).all()
        assert gradient.abs().max() < 1e-6
        if name != "kl":
            assert (values >= 0).all()


@pytest.mark.parametrize("name", ["gram", "feature", "kl"])
@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_tokens(name, student_dtype):
    """Cast to float32 first: the value is that of the rounded tokens, and the gradient comes back in their dtype."""
    student, teacher = random_tokens(2, 40, 16, 12)
    student, teacher = student.to(student_dtype), teacher.to(torch.bfloat16)
    exact, reference = LOSSES[name]
    values, gradient = value_and_gradient(exact, student, teacher)
    expected_values, expected_gradient = value_and_gradient(reference, student.double(), teacher.double())
    assert values.dtype == torch.float32
    assert gradient.dtype == student_dtype
    torch.testing.assert_close(values.double(), expected_values, rtol=1e-5, atol=1e-7)
    # float16 keeps three digits, of gradients below 6e-5 fewer.
    assert (gradient.double() - expected_gradient).norm() <= 1e-2 * expected_gradient.norm()


@pytest.mark.parametrize("name", ["gram", "feature", "kl"])
def test_mixed_float64_and_float32(name):
    student, teacher = random_tokens(2, 20, 8, 8)
    values, gradient = value_and_gradient(LOSSES[name][0], student, teacher.float())
    assert values.dtype == torch.float32
    assert gradient.dtype == torch.float64


@pytest.mark.parametrize("name", ["gram", "feature", "kl"])
def test_strided_tokens(name):
    """Views as they come from a class-token slice, a transposed map, and an expanded gradient."""
    student, teacher = random_tokens(2, 20, 8, 8)
    sliced = torch.cat([student[:, :1], student], dim=1)[:, 1:]
    mapped = teacher.transpose(1, 2).contiguous().transpose(1, 2)
    exact = LOSSES[name][0]
    expected, expected_gradient = value_and_gradient(exact, student, teacher)
    leaf = sliced.detach().requires_grad_()
    values = exact(leaf, mapped)
    torch.testing.assert_close(values.detach(), expected)
    values.mean().backward()
    torch.testing.assert_close(leaf.grad[0], expected_gradient[0] / 2)


@pytest.mark.parametrize("name", ["gram", "feature", "kl"])
def test_empty_batch_and_no_grad(name):
    student, teacher = random_tokens(2, 20, 8, 8)
    exact = LOSSES[name][0]
    with torch.no_grad():
        values = exact(student.requires_grad_(), teacher)
    assert not values.requires_grad
    torch.testing.assert_close(values, exact(student, teacher).detach())
    empty = student.detach()[:0].requires_grad_()
    values = exact(empty, teacher[:0])
    assert values.shape == (0,)
    values.sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("name", LOSSES)
def test_teacher_gets_no_gradient(name):
    student, teacher = random_tokens(2, 20, 8, 8)
    LOSSES[name][0](student.requires_grad_(), teacher.requires_grad_()).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_nan_is_not_hidden():
    student, teacher = random_tokens(2, 20, 8, 8)
    student[1, 3, 2] = float("nan")
    for name in ("gram", "feature", "kl"):
        values = LOSSES[name][0](student, teacher)
        assert torch.isfinite(values[0]) and torch.isnan(values[1])


def test_choice_of_form_by_cost():
    assert choose_mse_form(1280, 768, 768) == "gram"
    assert choose_mse_form(1281, 768, 768) == "feature"
    # N (D_T + 2 D_S) = 400 N against D_T^2 + 2 D_T D_S + 2 D_S^2 = 100000
    assert choose_mse_form(250, 100, 200) == "gram"
    assert choose_mse_form(251, 100, 200) == "feature"


def test_auto_takes_the_chosen_form():
    student, teacher = random_tokens(1, 12, 6, 6, dtype=torch.float32)
    assert torch.equal(gram_mse_loss(student, teacher), gram_mse_loss(student, teacher, form="feature"))
    assert torch.equal(
        gram_mse_loss(student[:, :9], teacher[:, :9]), gram_mse_loss(student[:, :9], teacher[:, :9], form="gram")
    )
    assert not torch.equal(
        gram_mse_loss(student, teacher, form="gram"), gram_mse_loss(student, teacher, form="feature")
    )
