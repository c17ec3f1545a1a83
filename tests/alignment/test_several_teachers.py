"""Several teachers at once, each with a projector and a weight of its own, and teachers on other grids."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.registry import build_projector, build_terms
from diffusers_srepa.alignment.term import AlignmentTerm
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.teachers.auto_teacher import Teacher
from diffusers_srepa.tokens import TeacherFeatures, TokenMap
from tests.helpers.tiny_sit import tiny_inputs, tiny_sit
from tests.helpers.tiny_teachers import build_model, write_processor


# What a YAML file says of a run with three teachers, two depths and five terms.
TERMS = {
    "dino": {"objective": "cosine", "weight": 0.5, "tap": "early", "projector": "dino", "target": "dino"},
    "dino_gram": {
        "objective": {"name": "gram_mse"},
        "weight": 2.0,
        "tap": "early",
        "projector": "dino",
        "target": "dino",
    },
    "clip": {"objective": "cosine", "weight": 0.25, "tap": "late", "projector": "clip", "target": "clip"},
    "siglip": {
        "objective": {"name": "gram_kl"},
        "weight": 0.125,
        "tap": "late",
        "projector": None,
        "target": "siglip",
    },
    "spread": {"objective": "dispersive", "weight": 0.0625, "tap": "late", "projector": None},
}
PROJECTORS = {"dino": {"name": "conv", "kernel_size": 1}, "clip": {"name": "mlp", "hidden_dim": 12}}
KINDS = {"dino": "dinov2_with_registers", "clip": "clip", "siglip": "siglip"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    folder = tmp_path_factory.mktemp("teachers")
    for name, kind in KINDS.items():
        build_model(kind).save_pretrained(folder / name)
        write_processor(folder / name)
    return {name: Teacher.from_pretrained(folder / name, grid=(4, 4)) for name in KINDS}


def build_student(terms: dict[str, AlignmentTerm]) -> tuple[AlignedDenoiser, AlignmentLoss]:
    criterion = AlignmentLoss(terms)
    torch.manual_seed(0)
    student = AlignedDenoiser(
        tiny_sit(),
        tap={"early": "transformer_blocks.0", "late": "transformer_blocks.1"},
        projector={name: build_projector(literal, 16, 32) for name, literal in PROJECTORS.items()},
        features=criterion.features(),
    )
    return student, criterion


def gram(tokens: torch.Tensor) -> torch.Tensor:
    tokens = F.normalize(tokens, dim=-1)
    return tokens @ tokens.mT


def neighbours(tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the other tokens at temperature 0.2, (B, N, N - 1)."""
    size = tokens.shape[1]
    others = gram(tokens)[:, ~torch.eye(size, dtype=torch.bool)].unflatten(1, (size, size - 1))
    return F.log_softmax(others / 0.2, dim=-1)


def test_a_training_step_with_three_teachers(teachers: dict[str, Teacher]) -> None:
    student, criterion = build_student(build_terms(TERMS))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    hidden: dict[str, torch.Tensor] = {}
    for name, index in (("early", 0), ("late", 1)):
        student.transformer.transformer_blocks[index].register_forward_hook(
            lambda block, args, output, name=name: hidden.__setitem__(name, output)
        )
    velocity, tokens = student(**tiny_inputs())
    features = {name: teacher(images) for name, teacher in teachers.items()}
    output = criterion(tokens, features, step=0)

    conv, mlp = student.projectors["dino"].conv, student.projectors["clip"].layers
    early = F.linear(hidden["early"], conv.weight[:, :, 0, 0], conv.bias)
    spread = -F.pdist(hidden["late"].flatten(1)).square() / hidden["late"][0].numel()
    siglip = features["siglip"].patch_tokens
    expected = {
        "dino": -F.cosine_similarity(early, features["dino"].patch_tokens, dim=-1).mean(),
        "dino_gram": (gram(early) - gram(features["dino"].patch_tokens)).square().sum() / (2 * 16 * 15),
        "clip": -F.cosine_similarity(mlp(hidden["late"]), features["clip"].patch_tokens, dim=-1).mean(),
        "siglip": F.kl_div(neighbours(hidden["late"]), neighbours(siglip), log_target=True, reduction="sum") / 32,
        "spread": (0.5 + 0.5 * spread.exp()).log().squeeze(),
    }
    assert output.weights == {"dino": 0.5, "dino_gram": 2.0, "clip": 0.25, "siglip": 0.125, "spread": 0.0625}
    for name, value in expected.items():
        torch.testing.assert_close(output.values[name], value, rtol=1e-4, atol=1e-5, msg=name)
    total = sum(output.weights[name] * value for name, value in expected.items())
    torch.testing.assert_close(output.loss, total, rtol=1e-4, atol=1e-5)

    loss = velocity.square().mean() + output.loss
    for name, own in (
        ("dino", 0.5 * expected["dino"] + 2.0 * expected["dino_gram"]),
        ("clip", 0.25 * expected["clip"]),
    ):
        parameters = list(student.projectors[name].parameters())
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        wanted = torch.autograd.grad(own, parameters, retain_graph=True)
        for gradient, expected_gradient in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, expected_gradient.view_as(gradient), rtol=1e-3, atol=1e-6)

    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    frozen = {name: value.clone() for name, value in teachers["dino"].state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    moved = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if name.startswith("projectors.")} <= moved
    assert all(torch.equal(value, frozen[name]) for name, value in teachers["dino"].state_dict().items())
    again = criterion(student(**tiny_inputs())[1], features, step=1)
    assert again.loss < output.loss


def test_each_teacher_can_end_at_its_own_step(teachers: dict[str, Teacher]) -> None:
    literals = {name: dict(literal) for name, literal in TERMS.items()}
    literals["clip"]["weight"] = {"name": "hard_stop", "step": 10, "value": 0.25}
    literals["siglip"]["weight"] = [{"name": "warm_up", "num_steps": 4}, {"name": "cosine_decay", "end": 20}]
    student, criterion = build_student(build_terms(literals))
    assert criterion.stop_steps() == (10, 20)
    assert criterion.teachers(9) == ("dino", "clip", "siglip") and criterion.teachers(20) == ("dino",)
    student.stop_features(set(student.features) - set(criterion.features(10)))
    assert not any(parameter.requires_grad for parameter in student.projectors["clip"].parameters())
    _, tokens = student(**tiny_inputs())
    images = torch.rand(2, 3, 64, 64)
    features = {name: teachers[name](images) for name in criterion.teachers(10)}
    assert set(features) == {"dino", "siglip"}
    output = criterion(tokens, features, step=10)
    assert "clip" not in output.values and output.weights["siglip"] == pytest.approx(0.5)
    (output.loss + 0.0).backward()
    assert all(parameter.grad is None for parameter in student.projectors["clip"].parameters())


# Teachers on another grid


def ramp(height: int, width: int) -> TeacherFeatures:
    """Tokens whose two features are the row and the column of their centre, both in [0, 1], and a class token."""
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    tokens = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).view(1, -1, 2)
    return TeacherFeatures(tokens, (height, width), torch.tensor([[3.0, 4.0]]))


def aligned(student_grid: tuple[int, int], features: TeacherFeatures, resample: str | None) -> torch.Tensor:
    """What an objective is given of the teacher, (h, w, 2)."""
    seen: list[torch.Tensor] = []
    term = AlignmentTerm(CosineAlignment(), resample=resample, target_transform=lambda m: seen.append(m.tokens) or m)
    tokens = TokenMap(torch.ones(1, 1 + student_grid[0] * student_grid[1], 2), student_grid, 1)
    AlignmentLoss({"cosine": term})({("default", "default"): tokens}, features)
    assert torch.equal(seen[0][0, 0], torch.tensor([3.0, 4.0])), "the class token is not resampled"
    return seen[0][0, 1:].unflatten(0, student_grid)


@pytest.mark.parametrize("grids", [((2, 2), (4, 4)), ((4, 4), (2, 2)), ((2, 3), (4, 6)), ((4, 4), (4, 2))])
def test_another_grid_is_an_error_by_default(grids: tuple[tuple[int, int], tuple[int, int]]) -> None:
    student, teacher = grids
    message = f"student's grid is {student[0]} x {student[1]} and the target's {teacher[0]} x {teacher[1]}: .*resample"
    with pytest.raises(ConfigurationError, match=message):
        aligned(student, ramp(*teacher), None)


@pytest.mark.parametrize("mode", ["area", "bilinear"])
def test_a_finer_teacher_is_pooled(mode: str) -> None:
    """A ramp keeps its values at the new centres; antialiased filters bend it at the border alone."""
    found = aligned((4, 4), ramp(8, 8), mode)
    expected = ramp(4, 4).patch_tokens[0].view(4, 4, 2)
    torch.testing.assert_close(found[1:3, 1:3], expected[1:3, 1:3])
    if mode == "area":
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["area", "bilinear"])
def test_a_coarser_teacher_is_spread(mode: str) -> None:
    teacher = ramp(4, 4)
    found = aligned((8, 8), teacher, mode)
    if mode == "area":
        repeated = teacher.patch_tokens[0].view(4, 4, 2).repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
        torch.testing.assert_close(found, repeated)
    else:
        torch.testing.assert_close(found[1:7, 1:7], ramp(8, 8).patch_tokens[0].view(8, 8, 2)[1:7, 1:7])


def test_a_real_teacher_of_twice_the_grid(teachers: dict[str, Teacher]) -> None:
    fine = Teacher.from_pretrained(teachers["dino"].name_or_path, grid=(8, 8))
    images = torch.rand(2, 3, 64, 64)
    student = AlignedDenoiser(tiny_sit(), "transformer_blocks.0", build_projector("linear", 16, 32))
    _, tokens = student(**tiny_inputs())
    term = AlignmentTerm(CosineAlignment(), resample="area")
    value = AlignmentLoss({"cosine": term})(tokens, fine(images)).loss
    pooled = F.avg_pool2d(fine(images).patch_tokens.mT.unflatten(2, (8, 8)), 2).flatten(2).mT
    expected = -F.cosine_similarity(tokens["default", "default"].tokens, pooled, dim=-1).mean()
    torch.testing.assert_close(value, expected)
