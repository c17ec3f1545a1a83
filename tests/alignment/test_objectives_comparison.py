"""The objectives of other methods, each against its formula written out pair by pair."""

import math

import pytest
import torch

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.objectives.batch import (
    BatchCKAAlignment,
    DispersiveAlignment,
    SimilarityPreservingAlignment,
)
from diffusers_srepa.alignment.objectives.pointwise import LayerSyncAlignment
from diffusers_srepa.alignment.objectives.relational import (
    CKAAlignment,
    DistanceMarginAlignment,
    GramMSEAlignment,
    PositiveGramAlignment,
    RKDDistanceAlignment,
)
from diffusers_srepa.tokens import TokenMap


SAMPLE_OBJECTIVES = [
    DistanceMarginAlignment(),
    PositiveGramAlignment(),
    PositiveGramAlignment("teacher"),
    RKDDistanceAlignment(),
    CKAAlignment(),
    LayerSyncAlignment(),
]
BATCH_OBJECTIVES = [SimilarityPreservingAlignment(), BatchCKAAlignment(), DispersiveAlignment()]
ALL_OBJECTIVES = SAMPLE_OBJECTIVES + BATCH_OBJECTIVES


def maps(batch=3, student_dim=5, target_dim=5, grid=(2, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    num_tokens = grid[0] * grid[1]
    student = torch.randn(batch, num_tokens, student_dim, generator=generator, dtype=torch.float64) + 0.3
    target = torch.randn(batch, num_tokens, target_dim, generator=generator, dtype=torch.float64) - 0.2
    return TokenMap(student.to(dtype), grid), TokenMap(target.to(dtype), grid)


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def cosine(x, y):
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


def distance(x, y):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))


def by_sample(formula, student, target):
    """A formula on lists of tokens, for each sample."""
    pairs = zip(student.tokens.tolist(), target.tokens.tolist(), strict=True)
    return torch.tensor([formula(s, t) for s, t in pairs], dtype=torch.float64)


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.6])
def test_distance_margin(margin):
    def formula(s, t):
        n = len(s)
        terms = [abs(cosine(s[i], s[j]) - cosine(t[i], t[j])) - margin for i in range(n) for j in range(n)]
        return sum(max(term, 0.0) for term in terms) / n**2

    student, target = maps(target_dim=7)
    value = DistanceMarginAlignment(margin)(student, target)
    torch.testing.assert_close(value, by_sample(formula, student, target))
    assert (value > 0).all()


@pytest.mark.parametrize("remove", ["both", "teacher"])
def test_positive_gram(remove):
    def formula(s, t):
        n, total = len(s), 0.0
        for i in range(n):
            for j in range(n):
                ours, theirs = cosine(s[i], s[j]), cosine(t[i], t[j])
                if remove == "both":
                    ours = max(ours, 0.0)
                total += (ours - max(theirs, 0.0)) ** 2
        return total / n**2

    student, target = maps(target_dim=7)
    value = PositiveGramAlignment(remove)(student, target)
    torch.testing.assert_close(value, by_sample(formula, student, target))
    # Without negative similarities on either side it is the plain Gram loss, up to the diagonal in the mean.
    student, target = (tokens.with_tokens(tokens.tokens.abs()) for tokens in (student, target))
    plain = GramMSEAlignment()(student, target)
    torch.testing.assert_close(PositiveGramAlignment(remove)(student, target), plain * 5 / 6)


def test_rkd_distance():
    def relative(tokens):
        n = len(tokens)
        pairs = {(i, j): distance(tokens[i], tokens[j]) for i in range(n) for j in range(n) if i != j}
        mean = sum(pairs.values()) / len(pairs)
        return {pair: value / mean for pair, value in pairs.items()}

    def huber(x):
        return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5

    def formula(s, t):
        ours, theirs = relative(s), relative(t)
        return sum(huber(ours[pair] - theirs[pair]) for pair in ours) / len(ours)

    student, target = maps(target_dim=7)
    # One far token makes a relative distance differ by more than 1, where the loss is linear.
    student.tokens[0, 0] *= 40
    value = RKDDistanceAlignment()(student, target)
    torch.testing.assert_close(value, by_sample(formula, student, target))
    moved = student.with_tokens(3 * student.tokens + 100)
    torch.testing.assert_close(RKDDistanceAlignment()(moved, target), value)


def test_rkd_distance_with_coinciding_tokens():
    student, target = maps()
    student.tokens[0, 1] = student.tokens[0, 0]
    student.tokens[1] = student.tokens[1, :1]
    target.tokens[2] = 0.0
    student.tokens.requires_grad_()
    value = RKDDistanceAlignment()(student, target)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(student.tokens.grad).all()
    assert student.tokens.grad[0].abs().max() > 0


def centred(rows):
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [[value - mean for value, mean in zip(row, means, strict=True)] for row in rows]


def cka(x, y):
    """Linear CKA through the kernels: sum_ij K_ij L_ij / sqrt(sum K_ij^2 sum L_ij^2)."""
    x, y = centred(x), centred(y)
    n = range(len(x))
    pairs = [(dot(x[i], x[j]), dot(y[i], y[j])) for i in n for j in n]
    return sum(k * m for k, m in pairs) / math.sqrt(sum(k * k for k, _ in pairs) * sum(m * m for _, m in pairs))


@pytest.mark.parametrize("dims", [(5, 7), (2, 3), (9, 4)])
def test_cka(dims):
    """Six tokens: through kernels for the wide features, through covariances for the narrow ones."""
    student, target = maps(student_dim=dims[0], target_dim=dims[1])
    value = CKAAlignment()(student, target)
    torch.testing.assert_close(value, by_sample(lambda s, t: 1 - cka(s, t), student, target))


def test_cka_is_blind_to_rotation_and_scale():
    student, _ = maps(student_dim=4)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    turned = student.with_tokens(1e3 * student.tokens @ rotation + 5)
    torch.testing.assert_close(CKAAlignment()(student, turned), torch.zeros(3, dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cka_of_equal_tokens(dtype):
    student, target = maps(dtype=dtype)
    student.tokens[1] = student.tokens[1, :1]
    student.tokens.requires_grad_()
    value = CKAAlignment()(student, target)
    value.sum().backward()
    assert value[1] == 1
    assert student.tokens.grad[1].abs().max() == 0
    assert torch.isfinite(student.tokens.grad).all() and student.tokens.grad[0].abs().max() > 0


def test_batch_cka():
    student, target = maps(batch=4, target_dim=7)
    value = BatchCKAAlignment()(student, target)
    assert BatchCKAAlignment.scope == "batch" and value.shape == ()
    expected = 1 - cka(student.tokens.flatten(1).tolist(), target.tokens.flatten(1).tolist())
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_similarity_preserving():
    def similarities(samples):
        rows = [[dot(x, y) for y in samples] for x in samples]
        return [[value / math.sqrt(dot(row, row)) for value in row] for row in rows]

    student, target = maps(batch=4, target_dim=7)
    value = SimilarityPreservingAlignment()(student, target)
    assert SimilarityPreservingAlignment.scope == "batch" and value.shape == ()
    ours, theirs = (similarities(tokens.tokens.flatten(1).tolist()) for tokens in (student, target))
    expected = sum((ours[i][j] - theirs[i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_dispersive(tau):
    student, _ = maps(batch=4)
    value = DispersiveAlignment(tau)(student)
    assert DispersiveAlignment.scope == "batch" and not DispersiveAlignment.needs_target and value.shape == ()
    samples = student.tokens.flatten(1).tolist()
    terms = [math.exp(-(distance(x, y) ** 2) / (30 * tau)) for x in samples for y in samples]
    assert value.item() == pytest.approx(math.log(sum(terms) / 16), abs=1e-12)
    assert value < 0
    # Larger distances, smaller loss; and a target that comes along is ignored.
    assert DispersiveAlignment(tau)(student.with_tokens(2 * student.tokens)) < value
    assert torch.equal(DispersiveAlignment(tau)(student, student), value)


def test_dispersive_of_equal_samples_is_zero():
    student, _ = maps()
    equal = student.with_tokens(student.tokens[:1].expand(3, -1, -1))
    assert DispersiveAlignment()(equal).item() == pytest.approx(0.0, abs=1e-12)


def test_layer_sync():
    early, late = maps()
    value = LayerSyncAlignment()(early, late)
    expected = by_sample(lambda s, t: -sum(cosine(x, y) for x, y in zip(s, t, strict=True)) / 6, early, late)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("detach", [True, False])
def test_layer_sync_leaves_the_gradient_to_the_late_layer_to_its_tap(detach):
    early, late = maps()
    early.tokens.requires_grad_()
    late.tokens.requires_grad_()
    LayerSyncAlignment()(early, late.detach() if detach else late).sum().backward()
    assert early.tokens.grad.abs().sum() > 0
    assert (late.tokens.grad is None) == detach


@pytest.mark.parametrize("objective", ALL_OBJECTIVES, ids=repr)
def test_gradients(objective: AlignmentObjective):
    student, target = maps()

    def loss(tokens):
        return objective(student.with_tokens(tokens), target)

    assert torch.autograd.gradcheck(loss, (student.tokens.clone().requires_grad_(),), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("objective", ALL_OBJECTIVES, ids=repr)
def test_float32_outside_autocast(objective: AlignmentObjective):
    student, target = maps(dtype=torch.float32)
    plain = objective(student, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = objective(student, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, plain)
    exact = objective(*maps(dtype=torch.float64))
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ALL_OBJECTIVES, ids=repr)
def test_zero_tokens_are_finite(objective: AlignmentObjective):
    student, target = maps(dtype=torch.float32)
    student.tokens[0, 2] = 0.0
    student.tokens[1] = 0.0
    target.tokens[0, 3] = 0.0
    target.tokens[2] = 0.0
    student.tokens.requires_grad_()
    value = objective(student, target)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.tokens.grad).all()
    assert student.tokens.grad.abs().max() < 10


@pytest.mark.parametrize("objective", ALL_OBJECTIVES, ids=repr)
def test_compiles_without_graph_breaks(objective: AlignmentObjective):
    torch._dynamo.reset()
    student, target = maps()

    def loss(tokens):
        return objective(student.with_tokens(tokens), target).sum()

    tokens = student.tokens.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(tokens), tokens)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(tokens), tokens)
    torch.testing.assert_close(gradient, expected)
    torch._dynamo.reset()


def test_clear_errors():
    student, target = maps(batch=1)
    for objective in BATCH_OBJECTIVES:
        with pytest.raises(ValueError, match="at least 2, but got 1: use a larger batch"):
            objective(student, target)
    one_token, _ = maps(grid=(1, 1))
    for objective in SAMPLE_OBJECTIVES[:-1]:
        with pytest.raises(ValueError, match="at least 2 tokens"):
            objective(one_token, one_token)
    for objective in ALL_OBJECTIVES[:-1]:
        with pytest.raises(ValueError, match="got none"):
            objective(student, None)
    with pytest.raises(ValueError, match="margin"):
        DistanceMarginAlignment(-0.1)
    with pytest.raises(ValueError, match="remove"):
        PositiveGramAlignment("student")
    with pytest.raises(ValueError, match="tau"):
        DispersiveAlignment(0.0)
    with pytest.raises(ValueError, match="equal width"):
        LayerSyncAlignment()(*maps(target_dim=7))
