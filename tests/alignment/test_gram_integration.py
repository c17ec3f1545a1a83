"""The exact forms inside what training wraps around them: compile, autocast, checkpointing, precision switches."""

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffusers_srepa.alignment.gram import kl, mse
from diffusers_srepa.alignment.gram.losses import gram_kl_loss, gram_mse_loss
from diffusers_srepa.alignment.gram.mse import full_precision_products
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramKLAlignment, GramMSEAlignment
from diffusers_srepa.tokens import TokenMap
from tests.helpers.algorithm_1 import algorithm_1


LOSSES = {
    "gram": lambda s, t: gram_mse_loss(s, t, form="gram"),
    "feature": lambda s, t: gram_mse_loss(s, t, form="feature"),
    "kl": gram_kl_loss,
}


def tokens(num_tokens=20, student_dim=8, teacher_dim=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, num_tokens, student_dim, generator=generator, dtype=dtype)
    return student, torch.randn(2, num_tokens, teacher_dim, generator=generator, dtype=dtype)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(name, dynamic, fresh_dynamo):
    def step(student, projection, teacher):
        return LOSSES[name](student @ projection, teacher).mean()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    projection = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for num_tokens in (20, 150) if dynamic else (20,):
        student, teacher = tokens(num_tokens)
        (expected,) = torch.autograd.grad(step(student, projection, teacher), projection)
        (gradient,) = torch.autograd.grad(compiled(student, projection, teacher), projection)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "objective", [CosineAlignment(), GramMSEAlignment(), GramMSEAlignment(form="feature"), GramKLAlignment()], ids=repr
)
def test_objectives_compile_under_autocast(objective, fresh_dynamo):
    def step(student, projection, teacher):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            projected = student @ projection
            return objective(TokenMap(projected, (4, 5)), TokenMap(teacher, (4, 5))).mean()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    student, teacher = tokens(teacher_dim=8)
    projection = torch.eye(8).requires_grad_()
    (expected,) = torch.autograd.grad(step(student, projection, teacher), projection)
    (gradient,) = torch.autograd.grad(compiled(student, projection, teacher), projection)
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_backward_under_autocast_stays_in_float32(name):
    student, teacher = tokens(dtype=torch.float32)
    student.requires_grad_()
    (expected,) = torch.autograd.grad(LOSSES[name](student, teacher).sum(), student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(LOSSES[name](student, teacher).sum(), student)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(name, use_reentrant):
    student, teacher = tokens(dtype=torch.float64)
    projection = torch.nn.Linear(8, 8, dtype=torch.float64)

    def step(student):
        return LOSSES[name](projection(student), teacher)

    expected = torch.autograd.grad(step(student.requires_grad_()).sum(), (student, projection.weight))
    projection.weight.grad = None
    student = student.detach().requires_grad_()
    checkpoint(step, student, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(student.grad, expected[0])
    torch.testing.assert_close(projection.weight.grad, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_the_rules_of_custom_operators(dtype):
    """No aliasing, no mutation, and shapes under tracing as in reality."""
    checks = ("test_schema", "test_faketensor")
    student, teacher = (x.to(dtype) for x in tokens(150))
    grad_losses = torch.ones(2)
    for forward, backward, arguments in (
        (mse._gram_forward, mse._gram_backward, ()),
        (mse._feature_forward, mse._feature_backward, ()),
        (kl._forward, kl._backward, (0.2, 0.3, "auto")),
    ):
        torch.library.opcheck(forward, (student, teacher, *arguments), test_utils=checks)
        _, *kept = forward(student, teacher, *arguments)
        inputs = (student,) if forward is mse._gram_forward else (student, teacher)
        torch.library.opcheck(backward, (grad_losses, *inputs, *kept, *arguments), test_utils=checks)


def allocations(step):
    """Bytes of each allocation on CPU while `step` runs, in order; negative where memory is given back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def pass_of(loss, student, teacher):
    return lambda: loss(student.detach().requires_grad_(), teacher).sum().backward()


@pytest.mark.parametrize("name", ["feature", "kl"])
def test_no_square_matrix_of_tokens_is_built(name):
    num_tokens = 2048
    student, teacher = (x[:1] for x in tokens(num_tokens, 16, 16))
    square = 4 * num_tokens**2
    assert max(allocations(pass_of(LOSSES[name], student, teacher))) < square
    plain = pass_of(lambda s, t: gram_mse_loss(s, t, form="reference"), student, teacher)
    assert max(allocations(plain)) >= square


@pytest.mark.slow
def test_memory_is_a_tenth_of_that_of_algorithm_1():
    student, teacher = (x[:1] for x in tokens(4096, 768, 768))
    peaks = {
        name: max(itertools.accumulate(allocations(pass_of(loss, student, teacher))))
        for name, loss in {
            "mse": gram_mse_loss,
            "kl": gram_kl_loss,
            "paper": lambda s, t: algorithm_1(s, t, "mse")[1],
        }.items()
    }
    assert peaks["mse"] < 0.1 * peaks["paper"]
    assert peaks["kl"] < 0.1 * peaks["paper"]


SETTINGS = {
    "untouched": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
}


def precision():
    """CUDA's setting for float32 products, in the words of whichever interface this version of PyTorch has."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@pytest.fixture(params=SETTINGS)
def precision_setting(request):
    SETTINGS[request.param]()
    yield request.param
    torch.set_float32_matmul_precision("highest")


def test_reduced_precision_is_off_inside_and_restored_outside(precision_setting):
    before = precision(), torch.backends.cuda.matmul.allow_tf32
    with full_precision_products():
        assert precision() in ("ieee", False)
    assert (precision(), torch.backends.cuda.matmul.allow_tf32) == before
    with pytest.raises(KeyError), full_precision_products():
        raise KeyError
    assert (precision(), torch.backends.cuda.matmul.allow_tf32) == before


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_full_precision_with_the_older_interface(setting, monkeypatch):
    """Versions of PyTorch without a setting per backend; "medium" comes back as such, not as "high"."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    torch.set_float32_matmul_precision(setting)
    try:
        with pytest.raises(KeyError), full_precision_products():
            inside = torch.get_float32_matmul_precision()
            raise KeyError
        assert (inside, torch.get_float32_matmul_precision()) == ("highest", setting)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_feature_form_computes_in_full_precision(monkeypatch):
    """Both passes, watched from within by wrapping a step of each."""
    seen = []
    for name in ("add_upper_gram_", "tangent_gradient_"):
        step = getattr(mse, name)
        monkeypatch.setattr(
            mse, name, lambda *args, name=name, step=step: (seen.append((name, precision())), step(*args))
        )
    student, teacher = tokens()
    torch.set_float32_matmul_precision("high")
    try:
        gram_mse_loss(student.requires_grad_(), teacher, form="feature").sum().backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {name for name, _ in seen} == {"add_upper_gram_", "tangent_gradient_"}
    assert all(setting in ("ieee", False) for _, setting in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_tokens", [7, 256, 1500])
def test_on_cuda(name, num_tokens):
    student, teacher = tokens(num_tokens, 96, 64)
    torch.backends.cuda.matmul.allow_tf32 = name == "feature"
    try:
        on_cpu = LOSSES[name](student.requires_grad_(), teacher)
        (expected,) = torch.autograd.grad(on_cpu.sum(), student)
        on_cuda = LOSSES[name](student.cuda(), teacher.cuda())
        (gradient,) = torch.autograd.grad(on_cuda.sum(), student)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=1e-4, atol=1e-7)
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()
