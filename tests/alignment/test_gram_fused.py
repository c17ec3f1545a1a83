"""The Triton kernels of the structural losses: in Triton's interpreter, through its compiler, on CUDA, and where
they cannot run.

The interpreter is chosen by an environment variable before triton is imported, so the tests that need it run in a
process of their own, which `test_kernels_in_the_interpreter` starts: `TRITON_INTERPRET=1 pytest` on this file.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_srepa.alignment.gram import kl, tiles, triton_launch
from diffusers_srepa.alignment.gram.losses import gram_kl_loss, gram_mse_loss, reference_gram_kl, reference_gram_mse
from diffusers_srepa.alignment.gram.normalize import normalize_into, tangent_gradient_


ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

KERNELS = ("normalize_kernel", "tangent_kernel", "sums_kernel", "weights_kernel")

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
in_interpreter = pytest.mark.skipif(not (INTERPRETED and HAS_TRITON), reason="runs in the interpreter's process")
outside_interpreter = pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter's process")


def random_tokens(batch, num_tokens, student_dim=24, teacher_dim=16, seed=0):
    """Float32 tokens of different lengths that are not centred, as real features are not."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dim):
        return (torch.randn(batch, num_tokens, dim, generator=generator) + 0.4) * torch.rand(
            batch, num_tokens, 1, generator=generator
        ).add(0.1)

    return draw(student_dim), draw(teacher_dim)


def value_and_gradient(loss, student, teacher):
    """Values `(B,)` and the gradient of their sum weighted by 1, 2, ..., so that samples do not hide one another."""
    student = student.detach().clone().requires_grad_()
    values = loss(student, teacher)
    weights = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    (values * weights).sum().backward()
    return values.detach(), student.grad


def assert_agrees(student, teacher, taus=(0.2, 0.2), reduction="mean", form="fused", tolerance=1e-5):
    """The float32 bounds of the other forms, against the reference in float64."""
    values, gradient = value_and_gradient(
        lambda s, t: gram_kl_loss(s, t, *taus, reduction=reduction, form=form), student, teacher
    )
    expected, expected_gradient = value_and_gradient(
        lambda s, t: reference_gram_kl(s, t, *taus, reduction), student.double(), teacher.double()
    )
    assert values.dtype == torch.float32
    assert gradient.dtype == student.dtype
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=2e-7 / min(taus))
    # Two tokens have one neighbour each, whose probability is 1 whatever they are: no gradient to compare with.
    absolute = 1e-6 if student.shape[1] == 2 else 0.0
    assert (gradient.double() - expected_gradient).norm() <= tolerance * expected_gradient.norm() + absolute
    return gradient


@pytest.fixture
def no_failure(monkeypatch):
    """No kernel has failed before, and what a test lets fail is forgotten after it."""
    monkeypatch.setattr(triton_launch._Failure, "reason", None)
    load = triton_launch._kernels
    load.cache_clear()
    yield
    load.cache_clear()


@needs_triton
@outside_interpreter
def test_kernels_in_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and " skipped" not in result.stdout, result.stdout


@in_interpreter
@pytest.mark.parametrize("num_tokens", [2, 3, 16, 64, 65, 256, 300])
def test_interpreted_agrees_with_reference(num_tokens):
    assert_agrees(*random_tokens(2, num_tokens))
    if num_tokens <= 65:
        assert_agrees(*random_tokens(3, num_tokens, 5, 40))


@in_interpreter
@pytest.mark.parametrize(("num_tokens", "rows"), [(64, 13), (65, 64), (129, 70), (300, 299), (9, 1)])
@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_interpreted_in_several_tiles(num_tokens, rows, elements, monkeypatch):
    """Squares that end within a block, last tiles of one row, and one sample or all at a time."""
    monkeypatch.setattr(tiles, "CPU_TILE_ROWS", rows)
    monkeypatch.setattr(tiles, "CPU_TILE_ELEMENTS", elements)
    assert_agrees(*random_tokens(2, num_tokens))


@in_interpreter
@pytest.mark.parametrize("taus", [(0.1, 0.7), (1.0, 0.05), (0.025, 0.025)])
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_interpreted_temperatures_and_reductions(taus, reduction):
    assert_agrees(*random_tokens(2, 70), taus, reduction, tolerance=2e-6 / min(taus))


@in_interpreter
@pytest.mark.parametrize("num_tokens", [2, 70])
def test_interpreted_zero_and_repeated_tokens(num_tokens):
    student, teacher = random_tokens(5, num_tokens, 9, 6)
    student[0, 1] = 0.0
    teacher[1, 0] = 0.0
    student[2, 1], teacher[2, 1] = 0.0, 0.0
    student[3, 1] = 3 * student[3, 0]
    teacher[3] = teacher[3, :1]
    student[4] = 0.0
    gradient = assert_agrees(student, teacher)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1].abs().max() == 0
    assert gradient[4].abs().max() == 0


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interpreted_low_precision_tokens(dtype):
    student, teacher = random_tokens(2, 70)
    assert_agrees(student.to(dtype), teacher.bfloat16(), tolerance=1e-2)


@in_interpreter
def test_interpreted_strided_tokens():
    student, teacher = random_tokens(2, 71)
    assert_agrees(student[:, 1:], teacher[:, 1:].transpose(1, 2).contiguous().transpose(1, 2))


@in_interpreter
def test_interpreted_nan_is_not_hidden_and_stays_in_its_sample():
    student, teacher = random_tokens(2, 70)
    student[1, 3, 2] = float("nan")
    values, gradient = value_and_gradient(lambda s, t: gram_kl_loss(s, t, form="fused"), student, teacher)
    assert torch.isfinite(values[0]) and torch.isnan(values[1])
    assert torch.isfinite(gradient[0]).all() and torch.isnan(gradient[1]).any()


@in_interpreter
def test_interpreted_twice_is_the_same_to_the_bit():
    student, teacher = random_tokens(2, 130)
    first, second = (value_and_gradient(lambda s, t: gram_kl_loss(s, t, form="fused"), student, teacher) for _ in "ab")
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@in_interpreter
def test_interpreted_auto_takes_the_kernels():
    """The interpreter counts as a device; float64 goes without kernels, as do low temperatures."""
    student, teacher = random_tokens(2, 130)
    results = {
        form: value_and_gradient(lambda s, t, form=form: gram_kl_loss(s, t, form=form), student, teacher)[1]
        for form in ("auto", "fused", "tiled")
    }
    assert torch.equal(results["auto"], results["fused"])
    assert not torch.equal(results["auto"], results["tiled"])
    assert_agrees(student, teacher, (0.02, 0.2), form="auto")
    with pytest.raises(ValueError, match="float32 and this is float64"):
        gram_kl_loss(student, teacher, 0.02, 0.2, form="fused")


@in_interpreter
def test_interpreted_operators_keep_the_rules():
    student, teacher = random_tokens(2, 70)
    checks, options = ("test_schema", "test_faketensor"), (0.2, 0.3, "fused")
    torch.library.opcheck(kl._forward, (student, teacher, *options), test_utils=checks)
    _, sums = kl._forward(student, teacher, *options)
    torch.library.opcheck(kl._backward, (torch.ones(2), student, teacher, sums, *options), test_utils=checks)


@in_interpreter
def test_interpreted_failure_in_the_backward_pass(no_failure, monkeypatch):
    student, teacher = random_tokens(2, 70)
    kernels = SimpleNamespace(**{name: getattr(triton_launch._kernels(), name) for name in KERNELS})
    kernels.weights_kernel = BrokenKernel()
    monkeypatch.setattr(triton_launch, "_kernels", lambda: kernels)
    with pytest.warns(RuntimeWarning, match="no such luck"):
        assert_agrees(student, teacher, form="auto")


@in_interpreter
@pytest.mark.parametrize("dim", [1, 5, 768, 1500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_interpreted_normalization(dim, dtype):
    """Into a part of larger memory, from strided tokens, and back."""
    tokens = (torch.randn(3, dim, 7) * torch.tensor([1e-3, 1.0, 30.0]).view(3, 1, 1)).to(dtype).transpose(1, 2)
    tokens[1, 2] = 0.0
    tokens[2, 6] = 1e-9
    memory = torch.full((4, 9, dim), 7.0)
    normalized, inverse = normalize_into(memory, tokens, use_kernels=True)
    norms = tokens.double().norm(dim=-1, keepdim=True)
    expected = torch.where(norms < 1e-6, 0.0, tokens.double() / norms)
    torch.testing.assert_close(normalized.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(inverse.double(), torch.where(norms < 1e-6, 0.0, 1 / norms), rtol=1e-6, atol=0)
    assert (memory[3] == 7).all() and (memory[:, 7:] == 7).all()

    gradients, scale = torch.randn(5, 9, dim), torch.randn(3, 7, 1)
    before = gradients.clone()
    tangent_gradient_(gradients[:3, 1:8], normalized, scale, use_kernels=True)
    radial = (before[:3, 1:8].double() * expected).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(
        gradients[:3, 1:8].double(), (before[:3, 1:8] - radial * expected) * scale, rtol=1e-5, atol=1e-5
    )
    gradients[:3, 1:8] = before[:3, 1:8]
    assert torch.equal(gradients, before)


@in_interpreter
@pytest.mark.parametrize("mse_form", ["gram", "feature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_mse(mse_form, dtype, monkeypatch):
    """Their token kernels run, in several chunks and tiles, and give the reference's values."""
    monkeypatch.setattr(tiles, "CPU_TILE_ROWS", 50)
    monkeypatch.setattr(tiles, "CPU_CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(tiles, "CPU_TILE_ELEMENTS", 1000)
    student, teacher = (tokens.to(dtype) for tokens in random_tokens(3, 130))
    student[0, 3] = 0.0
    launched, launch = [], triton_launch._launch
    monkeypatch.setattr(
        triton_launch, "_launch", lambda *args, **more: (launched.append(args[0]), launch(*args, **more))
    )
    values, gradient = value_and_gradient(lambda s, t: gram_mse_loss(s, t, form=mse_form), student, teacher)
    expected, expected_gradient = value_and_gradient(reference_gram_mse, student.double(), teacher.double())
    assert set(launched) == {"normalize_kernel", "tangent_kernel"}
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-7)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (gradient.double() - expected_gradient).norm() <= tolerance * expected_gradient.norm()


POINTERS = {"tokens": "*bf16"} | dict.fromkeys(
    ("teacher", "student", "row_parts", "column_parts", "teacher_shares", "student_shares", "normalized", "inverses",
     "gradient", "scale"), "*fp32"
)  # fmt: skip


@needs_triton
@outside_interpreter
@pytest.mark.parametrize(
    ("capability", "ones"), [(80, ()), (90, ()), (90, ("num_rows", "num_tokens")), (90, "all")], ids=str
)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(name, capability, ones, tmp_path, monkeypatch):
    """To machine code, no device needed; Triton replaces integers that are 1 by constants, as in a last tile of one
    row."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_launch._kernels(), name)
    signature = {argument: POINTERS.get(argument, "i32") for argument in kernel.arg_names}
    blocks = {
        "BLOCK_ROWS": triton_launch.BLOCK_ROWS,
        "BLOCK_COLUMNS": triton_launch.BLOCK_COLUMNS,
        "BLOCK_TOKENS": 4,
        "BLOCK_ELEMENTS": 1024,
    }
    constants = {argument: size for argument, size in blocks.items() if argument in signature}
    signature |= dict.fromkeys(constants, "constexpr")
    signature |= {"zero_norm": "fp32"} if "zero_norm" in signature else {}
    for argument, kind in signature.items():
        if kind == "i32" and (ones == "all" or argument in ones):
            signature[argument], constants[argument] = "constexpr", 1
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"num_warps": triton_launch.NUM_WARPS if "BLOCK_ROWS" in signature else 4}
    assert compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


class BrokenKernel:
    """A kernel that does not compile."""

    def __init__(self):
        self.error = RuntimeError("no such luck\nand a long trace")
        self.launches = 0

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches += 1
            raise self.error

        return launch


@pytest.fixture
def broken_kernel(no_failure, monkeypatch):
    """Kernels that look able to run on a CPU, and fail."""
    kernel = BrokenKernel()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_launch, "_kernels", lambda: SimpleNamespace(**dict.fromkeys(KERNELS, kernel)))
    return kernel


def test_a_failing_kernel_gives_one_warning_and_the_result(broken_kernel):
    student, teacher = random_tokens(2, 20)
    with pytest.warns(RuntimeWarning) as record:
        gradient = assert_agrees(student, teacher, form="auto")
        assert_agrees(student, teacher, form="auto")
    assert len(record) == 1
    assert "no such luck" in str(record[0].message) and "trace" not in str(record[0].message)
    assert broken_kernel.launches == 1
    plain = value_and_gradient(lambda s, t: gram_kl_loss(s, t, form="tiled"), student, teacher)[1]
    assert torch.equal(gradient, plain)


@pytest.mark.parametrize("mse_form", ["gram", "feature"])
def test_a_failing_kernel_of_the_mse(mse_form, broken_kernel):
    student, teacher = random_tokens(2, 20)
    with pytest.warns(RuntimeWarning) as record:
        values, gradient = value_and_gradient(lambda s, t: gram_mse_loss(s, t, form=mse_form), student, teacher)
    assert len(record) == 1
    assert broken_kernel.launches == 1
    expected, expected_gradient = value_and_gradient(reference_gram_mse, student.double(), teacher.double())
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def test_a_failing_kernel_that_is_demanded_is_an_error(broken_kernel):
    student, teacher = random_tokens(2, 20)
    with pytest.raises(ValueError, match=r"a kernel failed \(RuntimeError: no such luck\): set form='auto'"):
        gram_kl_loss(student, teacher, form="fused")


def test_lack_of_memory_is_no_failure_of_a_kernel(broken_kernel):
    broken_kernel.error = torch.OutOfMemoryError("full")
    student, teacher = random_tokens(2, 20)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        gram_kl_loss(student, teacher)
    assert triton_launch._Failure.reason is None


def test_without_triton(no_failure, monkeypatch):
    """No kernels, no warning, the same result."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "diffusers_srepa.alignment.gram.triton_kernels", raising=False)
    # An import statement would find the module on its package, too.
    monkeypatch.delattr("diffusers_srepa.alignment.gram.triton_kernels", raising=False)
    student, teacher = random_tokens(2, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_agrees(student, teacher, form="auto")
    with pytest.raises(ValueError, match="triton is not installed: set form='auto'"):
        gram_kl_loss(student, teacher, form="fused")


@outside_interpreter
def test_kernels_demanded_on_a_cpu():
    student, teacher = random_tokens(2, 20)
    with pytest.raises(ValueError, match="CUDA device and the tokens are on cpu: set form='auto'"):
        gram_kl_loss(student, teacher, form="fused")
    with pytest.raises(ValueError, match="float32 and this is float64"):
        gram_kl_loss(student.double(), teacher.double(), form="fused")


@outside_interpreter
def test_kernels_are_not_loaded_on_a_cpu():
    """Triton takes a second to import."""
    code = (
        "import sys, torch\n"
        "from diffusers_srepa.alignment.gram.losses import gram_kl_loss\n"
        "gram_kl_loss(torch.randn(1, 5, 3).requires_grad_(), torch.randn(1, 5, 3)).sum().backward()\n"
        "assert 'diffusers_srepa.alignment.gram.triton_kernels' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@outside_interpreter
@pytest.mark.parametrize("num_tokens", [2, 16, 64, 256, 300, 1025, 4096])
def test_on_cuda_agrees_with_reference(num_tokens):
    student, teacher = random_tokens(2, num_tokens, 96, 64)
    assert_agrees(student.cuda(), teacher.cuda())
    assert_agrees(student.cuda().bfloat16(), teacher.cuda(), tolerance=1e-2)


@pytest.mark.gpu
@outside_interpreter
@pytest.mark.parametrize("mse_form", ["gram", "feature"])
@pytest.mark.parametrize("num_tokens", [2, 300, 1025, 4096])
def test_on_cuda_mse_agrees_with_reference(mse_form, num_tokens):
    student, teacher = (tokens.cuda() for tokens in random_tokens(2, num_tokens, 96, 64))
    values, gradient = value_and_gradient(lambda s, t: gram_mse_loss(s, t, form=mse_form), student, teacher)
    expected, expected_gradient = value_and_gradient(reference_gram_mse, student.double(), teacher.double())
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-7)
    assert (gradient.double() - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()
    assert triton_launch._Failure.reason is None


@pytest.mark.gpu
@outside_interpreter
def test_on_cuda_kernels_agree_with_tiles():
    student, teacher = (tokens.cuda() for tokens in random_tokens(3, 2500, 96, 64))
    results = {
        form: value_and_gradient(lambda s, t, form=form: gram_kl_loss(s, t, 0.1, 0.3, form=form), student, teacher)
        for form in ("fused", "tiled", "auto")
    }
    torch.testing.assert_close(results["fused"][0], results["tiled"][0], rtol=1e-5, atol=1e-6)
    difference = (results["fused"][1] - results["tiled"][1]).norm()
    assert difference <= 1e-5 * results["tiled"][1].norm()
    assert torch.equal(results["auto"][1], results["fused"][1]) and triton_launch._Failure.reason is None


@pytest.mark.gpu
@outside_interpreter
def test_on_cuda_compiles_without_graph_breaks():
    torch._dynamo.reset()

    def step(student, projection, teacher):
        return gram_kl_loss(student @ projection, teacher, form="fused").mean()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    student, teacher = (tokens.cuda() for tokens in random_tokens(2, 300))
    projection = torch.eye(24, device="cuda").requires_grad_()
    (expected,) = torch.autograd.grad(step(student, projection, teacher), projection)
    (gradient,) = torch.autograd.grad(compiled(student, projection, teacher), projection)
    torch.testing.assert_close(gradient, expected)
