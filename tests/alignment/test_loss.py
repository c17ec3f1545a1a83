"""The weighted sum: which tokens meet which target, raw values apart from weights, float32 outside autocast."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramKLAlignment, GramMSEAlignment
from diffusers_srepa.alignment.schedule import HardStop, WarmUp
from diffusers_srepa.alignment.spatial_norm import SpatialNorm
from diffusers_srepa.alignment.term import AlignmentTerm, Tap
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.tokens import TeacherFeatures, TokenMap


KEY = ("default", "default")


@dataclass(frozen=True)
class Recorder(AlignmentObjective):
    """Passes the mean of what it sees through and keeps it."""

    seen: list = None

    def compute(self, student, target):
        self.seen.append((student, target))
        return student.mean(dim=(1, 2))


@dataclass(frozen=True)
class Spread(AlignmentObjective):
    """An objective over the batch, without a target."""

    scope: ClassVar[str] = "batch"
    needs_target: ClassVar[bool] = False

    def compute(self, student, target):
        assert target is None
        return -student.mean(dim=1).var(dim=0).mean()


def golden_tokens() -> tuple[dict, TeacherFeatures]:
    b = torch.arange(2, dtype=torch.float64).view(2, 1, 1)
    t = torch.arange(16, dtype=torch.float64).view(1, 16, 1)
    d = torch.arange(8, dtype=torch.float64).view(1, 1, 8)
    teacher = torch.sin(0.1 * (t + 1) * (d + 1) + b)
    student = torch.cos(0.13 * (t + 1) * (d + 1) + 0.5 * b + 0.2 * t)
    return {KEY: TokenMap(student.requires_grad_(), (4, 4))}, TeacherFeatures(teacher, (4, 4))


def tokens(dim: int = 6, grid: tuple[int, int] = (2, 3), prefix: int = 0, dtype=torch.float32) -> TokenMap:
    return TokenMap(torch.randn(2, prefix + grid[0] * grid[1], dim, dtype=dtype), grid, prefix)


def teacher(dim: int = 6, grid: tuple[int, int] = (2, 3), class_token: bool = False) -> TeacherFeatures:
    return TeacherFeatures(torch.randn(2, grid[0] * grid[1], dim), grid, torch.randn(2, dim) if class_token else None)


def test_golden_values_raw_and_weighted():
    criterion = AlignmentLoss(
        {
            "cosine": (CosineAlignment(), 1.0),
            "gram_mse": (GramMSEAlignment(), 2.0),
            "gram_kl": (GramKLAlignment(), 0.5),
        }
    )
    output = criterion(*golden_tokens())
    assert {name: value.item() for name, value in output.values.items()} == pytest.approx(
        {"cosine": 0.14118673, "gram_mse": 0.15648402, "gram_kl": 0.51156789}, abs=1e-7
    )
    assert output.weights == {"cosine": 1.0, "gram_mse": 2.0, "gram_kl": 0.5}
    assert output.loss.item() == pytest.approx(0.14118673 + 2 * 0.15648402 + 0.5 * 0.51156789, abs=1e-7)
    assert output.loss.shape == () and output.loss.dtype == torch.float64


def test_gradient_is_the_weighted_sum_of_the_gradients_of_the_raw_values():
    student, features = golden_tokens()
    criterion = AlignmentLoss({"cosine": (CosineAlignment(), 0.7), "gram_mse": (GramMSEAlignment(), 2.0)})
    output = criterion(student, features)
    leaf = student[KEY].tokens
    parts = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in output.values.values()]
    (total,) = torch.autograd.grad(output.loss, leaf)
    torch.testing.assert_close(total, 0.7 * parts[0] + 2.0 * parts[1])


def test_low_precision_tokens_are_compared_in_float32_outside_autocast():
    seen = []
    student = tokens(dtype=torch.bfloat16)
    criterion = AlignmentLoss({"recorder": (Recorder(seen=seen), 1.0), "gram": (GramMSEAlignment(), 1.0)})
    features = teacher()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = criterion({KEY: student}, features)
    assert seen[0][0].dtype == seen[0][1].dtype == output.loss.dtype == torch.float32
    outside = criterion({KEY: TokenMap(student.tokens.float(), student.grid)}, features)
    assert torch.equal(output.loss, outside.loss)


def test_the_teacher_gets_no_gradient():
    features = TeacherFeatures(torch.randn(2, 6, 6, requires_grad=True), (2, 3))
    student = TokenMap(torch.randn(2, 6, 6, requires_grad=True), (2, 3))
    AlignmentLoss({"gram": (GramMSEAlignment(), 1.0)})({KEY: student}, features).loss.backward()
    assert student.tokens.grad is not None and features.patch_tokens.grad is None


def test_several_taps_projectors_and_teachers_are_kept_apart():
    seen = []
    names = {"early": ("a", "p"), "late": ("b", "q"), "raw": ("b", None)}
    terms = {
        name: AlignmentTerm(Recorder(seen=seen), tap=tap, projector=projector, target="dino" if tap == "a" else "clip")
        for name, (tap, projector) in names.items()
    }
    student = {key: tokens() for key in names.values()}
    features = {"dino": teacher(), "clip": teacher()}
    criterion = AlignmentLoss(terms)
    output = criterion(student, features)
    for (student_seen, target_seen), (key, teacher_name) in zip(
        seen, [(("a", "p"), "dino"), (("b", "q"), "clip"), (("b", None), "clip")], strict=True
    ):
        assert torch.equal(student_seen, student[key].tokens)
        assert torch.equal(target_seen, features[teacher_name].patch_tokens)
    assert list(output.values) == ["early", "late", "raw"]
    assert criterion.features() == (("a", "p"), ("b", "q"), ("b", None))
    assert criterion.teachers() == ("dino", "clip")


def test_one_set_of_features_stands_for_the_only_teacher_named():
    term = AlignmentTerm(CosineAlignment(), target="dino")
    student, features = {KEY: tokens()}, teacher()
    alone = AlignmentLoss({"term": term})(student, features)
    assert torch.equal(alone.loss, AlignmentLoss({"term": term})(student, {"dino": features}).loss)
    both = AlignmentLoss({"term": term, "other": AlignmentTerm(CosineAlignment(), target="clip")})
    with pytest.raises(ConfigurationError, match="'dino', 'clip'"):
        both(student, features)


def test_another_tap_as_target_is_detached():
    deep, shallow = (TokenMap(torch.randn(2, 6, 6, requires_grad=True), (2, 3)) for _ in range(2))
    term = AlignmentTerm(CosineAlignment(), tap="shallow", projector=None, target=Tap("deep"))
    criterion = AlignmentLoss({"self": term})
    assert criterion.features() == (("shallow", None), ("deep", None)) and criterion.teachers() == ()
    output = criterion({("shallow", None): shallow, ("deep", None): deep})
    torch.testing.assert_close(output.loss, CosineAlignment()(shallow, deep).mean())
    output.loss.backward()
    assert shallow.tokens.grad is not None and deep.tokens.grad is None


def test_another_tap_as_target_gets_gradient_where_it_is_asked_for():
    @dataclass(frozen=True)
    class Distance(AlignmentObjective):
        detaches_target: ClassVar[bool] = False

        def compute(self, student, target):
            return (student - target).square().mean(dim=(1, 2))

    deep, shallow = (TokenMap(torch.randn(2, 6, 6, requires_grad=True), (2, 3)) for _ in range(2))
    for detach in (True, False):
        deep.tokens.grad = None
        term = AlignmentTerm(Distance(), tap="shallow", projector=None, target=Tap("deep", detach=detach))
        AlignmentLoss({"self": term})({("shallow", None): shallow, ("deep", None): deep}).loss.backward()
        assert (deep.tokens.grad is None) == detach
    with pytest.raises(ConfigurationError, match="detaches every target"):
        AlignmentTerm(CosineAlignment(), tap="shallow", target=Tap("deep", detach=False))
    with pytest.raises(ConfigurationError, match="with itself"):
        AlignmentTerm(CosineAlignment(), tap="deep", projector=None, target=Tap("deep"))


def test_objectives_over_the_batch_and_without_target():
    student = {KEY: tokens()}
    criterion = AlignmentLoss({"spread": (Spread(), 0.5)})
    output = criterion(student)
    assert criterion.teachers() == () and criterion.terms["spread"].target is None
    torch.testing.assert_close(output.values["spread"], -student[KEY].tokens.mean(dim=1).var(dim=0).mean())
    torch.testing.assert_close(output.loss, 0.5 * output.values["spread"])


def test_the_target_transform_is_applied_to_the_target_alone():
    seen = []
    student, features = {KEY: tokens()}, teacher()
    AlignmentLoss({"t": AlignmentTerm(Recorder(seen=seen), target_transform=SpatialNorm(0.6))})(student, features)
    assert torch.equal(seen[0][0], student[KEY].tokens)
    assert torch.equal(seen[0][1], SpatialNorm(0.6)(features.token_map()).tokens)


def test_a_class_token_is_aligned_with_the_teachers_where_the_student_has_one():
    seen = []
    student, features = {KEY: tokens(prefix=1)}, teacher(class_token=True)
    criterion = AlignmentLoss(
        {
            "all": (Recorder(seen=seen), 1.0),
            "patches": (Recorder(seen=seen, include_prefix_tokens=False), 1.0),
        }
    )
    criterion(student, features)
    assert torch.equal(seen[0][1][:, 0], features.class_token) and seen[0][0].shape == (2, 7, 6)
    assert torch.equal(seen[1][1], features.patch_tokens) and seen[1][0].shape == (2, 6, 6)
    with pytest.raises(ConfigurationError, match="the teacher 'default' has none: .* include_prefix_tokens=False"):
        criterion(student, teacher())
    with pytest.raises(ConfigurationError, match="4 prefix tokens of the student and 1 of the target"):
        criterion({KEY: tokens(prefix=4)}, features)


def test_another_grid_is_an_error_unless_resampling_is_asked_for():
    student, features = {KEY: tokens(grid=(2, 2))}, teacher(grid=(4, 4))
    with pytest.raises(ConfigurationError, match="student's grid is 2 x 2 and the target's 4 x 4: .*grid.*resample"):
        AlignmentLoss({"cosine": (CosineAlignment(), 1.0)})(student, features)
    with pytest.raises(ConfigurationError, match="2 x 8"):
        AlignmentLoss({"gram": (GramMSEAlignment(), 1.0)})({KEY: tokens(grid=(2, 8))}, features)
    seen = []
    AlignmentLoss({"area": AlignmentTerm(Recorder(seen=seen), resample="area")})(student, features)
    cells = features.patch_tokens.view(2, 2, 2, 2, 2, 6).mean(dim=(2, 4)).view(2, 4, 6)
    torch.testing.assert_close(seen[0][1], cells)
    with pytest.raises(ConfigurationError, match="'nearest'"):
        AlignmentTerm(CosineAlignment(), resample="nearest")


def test_a_term_that_has_ended_is_not_computed_and_needs_neither_tokens_nor_teacher():
    criterion = AlignmentLoss(
        {
            "cosine": (CosineAlignment(), HardStop(step=10, value=0.5)),
            "spread": AlignmentTerm(Spread(), tap="late", projector=None),
            "off": (GramKLAlignment(), 0.0),
        }
    )
    student = {KEY: tokens(), ("late", None): tokens()}
    before = criterion(student, teacher(), step=9)
    assert set(before.values) == {"cosine", "spread"}
    assert before.weights == {"cosine": 0.5, "spread": 1.0, "off": 0.0}
    assert criterion.stop_steps() == (10,)
    assert criterion.teachers(9) == ("default",) and criterion.teachers(10) == ()
    assert criterion.features(9) == (KEY, ("late", None)) and criterion.features(10) == (("late", None),)
    after = criterion({("late", None): student["late", None]}, {}, step=10)
    assert set(after.values) == {"spread"} and after.weights == {"cosine": 0.0, "spread": 1.0, "off": 0.0}
    assert torch.equal(after.loss, after.values["spread"])


def test_a_weight_that_is_zero_for_now_still_reaches_the_projector():
    leaf = torch.randn(2, 6, 6, requires_grad=True)
    criterion = AlignmentLoss({"cosine": (CosineAlignment(), WarmUp(num_steps=10))})
    output = criterion({KEY: TokenMap(leaf, (2, 3))}, teacher(), step=0)
    output.loss.backward()
    assert output.loss.item() == 0 and output.values["cosine"].item() != 0
    assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("student", [{}, {KEY: tokens()}])
def test_no_terms_give_a_zero_loss(student):
    output = AlignmentLoss({})(student, {}, step=3)
    assert output.loss.item() == 0 and output.loss.shape == () and output.values == output.weights == {}


def test_unknown_names_are_answered_with_known_ones():
    student = {("default", None): tokens()}
    with pytest.raises(
        ConfigurationError, match="'c' reads tap 'default' through projector 'default', but the student"
    ):
        AlignmentLoss({"c": (CosineAlignment(), 1.0)})(student, teacher())
    term = AlignmentTerm(CosineAlignment(), projector=None, target="dinov3")
    with pytest.raises(ConfigurationError, match="'dinov3', which is unknown: did you mean 'dinov2'"):
        AlignmentLoss({"c": term})(student, {"dinov2": teacher(), "clip": teacher()})
    with pytest.raises(ConfigurationError, match="no teacher's features were passed"):
        AlignmentLoss({"c": term})(student)


def test_wrong_terms_are_refused():
    with pytest.raises(ConfigurationError, match="'c' is 1.0, but must be an AlignmentTerm"):
        AlignmentLoss({"c": 1.0})
    with pytest.raises(ConfigurationError, match="must be an AlignmentObjective"):
        AlignmentTerm(CosineAlignment)
    with pytest.raises(ConfigurationError, match="target is None"):
        AlignmentTerm(CosineAlignment(), target=None)
    with pytest.raises(ConfigurationError, match="-1"):
        AlignmentTerm(CosineAlignment(), weight=-1)


def test_an_objective_of_the_wrong_shape_is_named():
    @dataclass(frozen=True)
    class Scalar(AlignmentObjective):
        def compute(self, student, target):
            return student.mean()

    with pytest.raises(
        ConfigurationError, match=r"Scalar of scope 'sample' returns shape \(\), but must return \(2,\)"
    ):
        AlignmentLoss({"s": (Scalar(), 1.0)})({KEY: tokens()}, teacher())
