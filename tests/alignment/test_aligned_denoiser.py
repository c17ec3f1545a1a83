"""Transformer, taps and projectors as one module: golden values, any transformer, wrappers, files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from peft import LoraConfig
from torch import multiprocessing, nn
from transformers import Dinov2Config, Dinov2Model

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser, infer_grid
from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramMSEAlignment
from diffusers_srepa.alignment.projectors import ConvProjector, LinearProjector, MLPProjector
from diffusers_srepa.alignment.schedule import HardStop
from diffusers_srepa.alignment.term import AlignmentTerm, Tap
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.tokens import TokenMap
from tests.helpers.aligned_step import (
    PlainTransformer,
    features,
    gradients,
    plain_inputs,
    plain_student,
    total_loss,
    train_one_rank,
)
from tests.helpers.reference_weights import (
    DIM,
    PROJECTOR_DIM,
    TAP,
    TEACHER_DIM,
    golden_inputs,
    golden_model,
    projector_state_dict,
    without_prefix,
)


KEY = ("default", "default")


def golden_student(kind: str = "repa", projector: str = "mlp") -> AlignedDenoiser:
    """The golden transformer and projector in float64, in eval mode."""
    if projector == "mlp":
        module: nn.Module = MLPProjector(DIM, TEACHER_DIM, PROJECTOR_DIM).double()
        module.layers.load_state_dict(without_prefix(projector_state_dict("mlp"), "projectors.0."))
    else:
        module = ConvProjector(DIM, TEACHER_DIM).double()
        module.conv.load_state_dict(without_prefix(projector_state_dict("conv"), "projectors.0.projection_layer."))
    return AlignedDenoiser(golden_model(kind), TAP, module).eval()


def tiny_transformer() -> SiTTransformer2DModel:
    transformer = SiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=5,
        class_dropout_prob=0.0,
    )
    # The zero gates and head of a fresh SiT would hide every difference.
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return transformer


def tiny_student(dtype: torch.dtype = torch.float32) -> AlignedDenoiser:
    return AlignedDenoiser(tiny_transformer(), "transformer_blocks.0", MLPProjector(16, 12, hidden_dim=24)).to(dtype)


def inputs(batch_size: int = 2, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, 4, *size, generator=generator, dtype=torch.float64).to(dtype),
        "timestep": torch.linspace(100, 900, batch_size),
        "class_labels": torch.arange(batch_size) % 5,
    }


def assert_row(values: torch.Tensor, total: float, absolute: float, first: list[float], last: list[float]) -> None:
    """A row of the table of golden values; the sums of hundreds of numbers get a proportional tolerance."""
    assert values.sum().item() == pytest.approx(total, abs=1e-5)
    assert values.abs().sum().item() == pytest.approx(absolute, abs=1e-5)
    ends = torch.cat([values.flatten()[:4], values.flatten()[-4:]])
    torch.testing.assert_close(ends, torch.tensor(first + last, dtype=values.dtype), atol=1e-5, rtol=0)


# Golden values


@torch.no_grad()
def test_golden_repa_projection():
    velocity, tokens = golden_student()(**golden_inputs())
    assert velocity.shape == (2, 4, 8, 8) and list(tokens) == [KEY]
    assert tokens[KEY].grid == (4, 4) and tokens[KEY].num_prefix_tokens == 0
    assert_row(
        tokens[KEY].tokens,
        44.705307,
        45.225960,
        [0.131409, 0.092182, 0.053155, 0.174302],
        [0.125761, 0.037560, 0.031720, 0.095858],
    )


@torch.no_grad()
def test_golden_irepa_projection():
    _, tokens = golden_student(projector="conv")(**golden_inputs())
    assert_row(
        tokens[KEY].tokens,
        -55.356223,
        132.384856,
        [0.098660, 0.057303, 0.013008, -0.031778],
        [-0.123291, -0.107061, -0.088604, -0.069434],
    )


@torch.no_grad()
def test_golden_hidden_state_without_projector():
    student = AlignedDenoiser(golden_model(), TAP).eval()
    _, tokens = student(**golden_inputs())
    assert_row(
        tokens[KEY].tokens,
        544.722721,
        626.426834,
        [-0.036546, 0.105099, 0.168294, 0.064199],
        [1.001133, 0.970526, 0.783914, 0.866379],
    )


@pytest.mark.parametrize("return_dict", [True, False])
@torch.no_grad()
def test_golden_reg_projection_covers_the_class_token_and_its_velocity_comes_third(return_dict):
    student = golden_student("reg")
    velocity, tokens, class_token = student(**golden_inputs(class_token=True), return_dict=return_dict)
    assert tokens[KEY].num_prefix_tokens == 1 and tokens[KEY].tokens.shape == (2, 17, 16)
    assert_row(
        tokens[KEY].tokens,
        47.479796,
        48.001133,
        [0.125792, 0.090289, 0.062092, 0.160523],
        [0.125766, 0.037558, 0.031717, 0.095865],
    )
    assert velocity.sum().item() == pytest.approx(-19.873266, abs=1e-5)
    assert class_token.shape == (2, 16) and class_token.sum().item() == pytest.approx(2.147809, abs=1e-5)


def test_conv_projector_drops_the_class_token_of_reg():
    _, tokens, _ = golden_student("reg", projector="conv")(**golden_inputs(class_token=True))
    assert tokens[KEY].num_prefix_tokens == 0 and tokens[KEY].tokens.shape == (2, 16, 16)


# Features and grids


def test_the_full_form_names_taps_projectors_and_features():
    transformer = golden_model(dtype=torch.float32)
    student = AlignedDenoiser(
        transformer,
        tap={"early": "transformer_blocks.0", "late": "transformer_blocks.2"},
        projector={"dino": LinearProjector(DIM, 5), "clip": MLPProjector(DIM, 7, 8)},
        features=[("early", "dino"), ("late", "clip"), ("late", "dino"), ("late", None)],
    )
    _, tokens = student(**golden_inputs(torch.float32))
    assert list(tokens) == [("early", "dino"), ("late", "clip"), ("late", "dino"), ("late", None)]
    assert [token_map.dim for token_map in tokens.values()] == [5, 7, 5, DIM]
    late = tokens["late", None].tokens
    torch.testing.assert_close(tokens["late", "dino"].tokens, student.projectors["dino"](late))
    assert not torch.allclose(tokens["early", "dino"].tokens, tokens["late", "dino"].tokens)


@pytest.mark.parametrize(
    ("taps", "projectors", "expected"),
    [
        (["a", "b"], [], [("a", "default"), ("b", "default")]),
        (["a"], ["p", "q"], [("a", "p"), ("a", "q")]),
        (["a", "b"], ["p"], [("a", "p"), ("b", "p")]),
        (["a", "b"], ["b", "a"], [("a", "a"), ("b", "b")]),
        ([], [], []),
    ],
)
def test_default_features(taps, projectors, expected):
    paths = {name: f"transformer_blocks.{index}" for index, name in enumerate(taps)}
    student = AlignedDenoiser(golden_model(), paths, {name: LinearProjector(DIM, 3) for name in projectors})
    assert list(student.features) == expected


def test_features_of_a_criterion_fit():
    criterion = AlignmentLoss(
        {
            "self": AlignmentTerm(CosineAlignment(), tap="early", projector=None, target=Tap("late")),
            "cosine": AlignmentTerm(CosineAlignment(), tap="late"),
        }
    )
    paths = {"early": "transformer_blocks.0", "late": "transformer_blocks.2"}
    student = AlignedDenoiser(
        golden_model(dtype=torch.float32), paths, LinearProjector(DIM, 12), features=criterion.features()
    )
    _, tokens = student(**golden_inputs(torch.float32))
    assert set(criterion(tokens, features()).values) == {"self", "cosine"}


def test_features_that_cannot_be_meant_are_refused():
    model, projectors = golden_model(), {"p": LinearProjector(DIM, 3), "q": LinearProjector(DIM, 3)}
    paths = {"a": "transformer_blocks.0", "b": "transformer_blocks.1"}
    with pytest.raises(ConfigurationError, match="give features"):
        AlignedDenoiser(model, paths, projectors)
    with pytest.raises(ConfigurationError, match="unknown projector: known names are 'p', 'q'"):
        AlignedDenoiser(model, paths, projectors, features=[("a", "x")])
    with pytest.raises(ConfigurationError, match="unknown tap: .*'a', 'b'"):
        AlignedDenoiser(model, paths, projectors, features=[("c", "p")])
    with pytest.raises(ConfigurationError, match="entries 0 to 2"):
        AlignedDenoiser(model, "transformer_blocks.7")
    with pytest.raises(ConfigurationError, match="cannot be registered"):
        AlignedDenoiser(model, TAP, {"keys": LinearProjector(DIM, 3)})


@pytest.mark.parametrize("name", ["a.b", "", "..", "a/b", "/tmp", "a b", "ä", "a\n", 3])
def test_names_of_projectors_are_names_and_never_paths(name):
    with pytest.raises(ConfigurationError, match="the name of a projector is .* must be a plain name") as error:
        AlignedDenoiser(golden_model("repa"), TAP, {name: LinearProjector(DIM, 3)})
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_every_module_names_the_folder_that_it_is_saved_into():
    model = golden_model("repa")
    own, clip = LinearProjector(DIM, 3), nn.Linear(DIM, 4)
    projectors = {"dino_v2-b": torch.compile(own, backend="eager"), "clip": clip}
    features = [("default", name) for name in projectors]
    student = AlignedDenoiser(torch.compile(model, backend="eager"), TAP, projectors, features)
    parts = student.saved_parts()
    assert list(parts) == ["transformer", "projectors/dino_v2-b", "projectors/clip"]
    assert parts["transformer"] is model
    assert parts["projectors/dino_v2-b"] is own and parts["projectors/clip"] is clip
    student.stop_features(features)
    assert list(student.saved_parts()) == list(parts)


@pytest.mark.parametrize(("size", "grid"), [((8, 8), (4, 4)), ((4, 12), (2, 6)), ((12, 6), (6, 3))])
def test_the_grid_follows_the_patch_size_and_the_input(size, grid):
    _, tokens = tiny_student()(**inputs(size=size))
    assert tokens[KEY].grid == grid


@pytest.mark.parametrize(("size", "grid"), [((8, 8), (4, 4)), ((4, 12), (2, 6)), ((12, 6), (6, 3))])
def test_without_a_configuration_the_grid_follows_the_aspect_ratio(size, grid):
    model = PlainTransformer()
    velocity, tokens = AlignedDenoiser(model, "blocks.0", LinearProjector(8, 3))(*plain_inputs(size=size))
    assert velocity.shape == (2, 4, *size)
    assert tokens[KEY].grid == grid and tokens[KEY].dim == 3


@pytest.mark.parametrize(
    ("num_tokens", "size", "grid"),
    [
        (256, (32, 32), (16, 16)),
        (12, (8, 24), (2, 6)),
        (6, (24, 16), (3, 2)),
        (17, (8, 8), None),
        (8, (8, 8), None),
        (0, (8, 8), None),
    ],
)
def test_a_grid_is_inferred_only_where_it_is_exact(num_tokens, size, grid):
    assert infer_grid(num_tokens, *size) == grid


def test_prefix_tokens_and_grid_can_be_given():
    model = PlainTransformer(num_registers=2)
    with pytest.raises(ConfigurationError, match="returns 18 tokens, of which 0 .*set grid or num_prefix_tokens"):
        AlignedDenoiser(model, "blocks.0")(*plain_inputs())
    _, tokens = AlignedDenoiser(model, "blocks.0", num_prefix_tokens=2)(*plain_inputs())
    assert tokens[KEY].num_prefix_tokens == 2 and tokens[KEY].grid == (4, 4)
    _, tokens = AlignedDenoiser(model, "blocks.0", grid=(2, 9))(*plain_inputs())
    assert tokens[KEY].grid == (2, 9)
    with pytest.raises(ConfigurationError, match="the grid is 3 x 3"):
        AlignedDenoiser(model, "blocks.0", grid=(3, 3))(*plain_inputs())


def test_modules_of_other_shapes_and_outputs_are_refused():
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"velocity": self.embed(x)}

    with pytest.raises(ConfigurationError, match="transformer returns a dict"):
        AlignedDenoiser(Dict(), "embed")(torch.randn(1, 4, 8, 4))
    with pytest.raises(ConfigurationError, match=r"returns shape \(1, 4\)"):
        AlignedDenoiser(Dict(), "embed")(torch.randn(1, 4))


# Models of diffusers that are not ours


def test_dit_of_diffusers():
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    student = AlignedDenoiser(dit, "transformer_blocks.0", ConvProjector(8, 12))
    velocity, tokens = student(
        torch.randn(2, 4, 8, 8), timestep=torch.tensor([1, 500]), class_labels=torch.tensor([0, 3])
    )
    assert velocity.shape == (2, 8, 8, 8) and tokens[KEY].grid == (4, 4)
    AlignmentLoss({"gram": (GramMSEAlignment(), 1.0)})(tokens, features()).loss.backward()
    assert dit.transformer_blocks[0].attn1.to_q.weight.grad.abs().sum() > 0
    assert dit.transformer_blocks[1].attn1.to_q.weight.grad is None


def test_mid_block_of_a_unet():
    unet = UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
    )
    student = AlignedDenoiser(unet, "mid_block", MLPProjector(8, 12, 8))
    velocity, tokens = student(torch.randn(2, 4, 16, 24), torch.tensor([1, 500]))
    assert velocity.shape == (2, 4, 16, 24) and tokens[KEY].grid == (4, 6)
    tokens[KEY].tokens.square().mean().backward()
    assert unet.down_blocks[0].resnets[0].conv1.weight.grad.abs().sum() > 0


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projectors_run_under_autocast_and_tokens_are_float32(dtype):
    student, seen = tiny_student(), []
    student.projectors["default"].layers[4].register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    with torch.autocast("cpu", dtype=dtype):
        velocity, tokens = student(**inputs())
    assert seen == [dtype] and tokens[KEY].tokens.dtype == torch.float32


def test_a_projector_keeps_its_own_dtype_outside_autocast():
    student = tiny_student()
    student.transformer.to(torch.bfloat16)
    velocity, tokens = student(**inputs(dtype=torch.bfloat16))
    assert velocity.dtype == torch.bfloat16 and tokens[KEY].tokens.dtype == torch.float32


def test_tokens_without_a_projector_are_float32_too():
    student = AlignedDenoiser(tiny_transformer().to(torch.bfloat16), "transformer_blocks.1")
    assert student(**inputs(dtype=torch.bfloat16))[1][KEY].tokens.dtype == torch.float32


def test_modules_of_others_project_plain_tokens():
    transformer = tiny_transformer()
    projector = nn.Sequential(nn.Linear(16, 3), nn.LayerNorm(3))
    _, tokens = AlignedDenoiser(transformer, "transformer_blocks.0", projector)(**inputs())
    assert isinstance(tokens[KEY], TokenMap) and tokens[KEY].grid == (4, 4) and tokens[KEY].dim == 3


# Gradients, checkpointing, compilation, copies, adapters


def test_gradient_reaches_transformer_up_to_the_tap_and_projector():
    student = tiny_student()
    _, tokens = student(**inputs())
    AlignmentLoss({"cosine": (CosineAlignment(), 1.0)})(tokens, features()).loss.backward()
    reached = gradients(student)
    assert any(name.startswith("transformer.transformer_blocks.0.") for name in reached)
    assert not any(name.startswith("transformer.transformer_blocks.1.") for name in reached)
    assert {name for name in reached if name.startswith("projectors.")} == {
        f"projectors.default.layers.{index}.{kind}" for index in (0, 2, 4) for kind in ("weight", "bias")
    }


def test_gradient_checkpointing_gives_the_same_gradients():
    plain = tiny_student(torch.float64).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.transformer.enable_gradient_checkpointing()
    batch, target = inputs(dtype=torch.float64), features(dtype=torch.float64)
    for student in (plain, checkpointed):
        total_loss(student(**batch), target).backward()
        assert student.taps["default"]._feature is None
    expected, found = gradients(plain), gradients(checkpointed)
    assert set(expected) == set(found) == {name for name, _ in plain.named_parameters()}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def assert_same_step(student: nn.Module, compiled: nn.Module, inner: nn.Module) -> None:
    batch, target = inputs(), features()
    loss = total_loss(student(**batch), target)
    loss.backward()
    compiled_loss = total_loss(compiled(**batch), target)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss)
    expected, found = gradients(student), gradients(inner)
    assert set(expected) == set(found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def test_compiles_as_a_whole_without_graph_breaks():
    student = tiny_student().train()
    inner = copy.deepcopy(student)
    assert_same_step(student, torch.compile(inner, backend="aot_eager", fullgraph=True), inner)


def test_compiles_by_blocks_together_with_gradient_checkpointing():
    student = tiny_student().train()
    inner = copy.deepcopy(student)
    inner.transformer.enable_gradient_checkpointing()
    inner.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert_same_step(student, inner, inner)


def test_takes_a_compiled_transformer():
    student = tiny_student()
    compiled = torch.compile(student.transformer, backend="aot_eager", fullgraph=True)
    wrapped = AlignedDenoiser(compiled, "transformer_blocks.0", student.projectors["default"])
    expected = student(**inputs())[1][KEY]
    found = wrapped(**inputs())[1][KEY]
    torch.testing.assert_close(found.tokens, expected.tokens)
    assert found.grid == (4, 4)


def test_a_deep_copy_is_independent():
    student = tiny_student()
    batch = inputs()
    before = student(**batch)[1][KEY].tokens
    average = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
        changed = average(**batch)[1][KEY].tokens
    assert not torch.allclose(before, changed)
    assert torch.equal(student(**batch)[1][KEY].tokens, before)
    assert average.taps["default"] is not student.taps["default"]
    alone = copy.deepcopy(student.transformer)
    alone(**batch)
    assert torch.equal(student(**batch)[1][KEY].tokens, before)


def test_lora_trains_under_the_tap():
    student = tiny_student()
    student.transformer.requires_grad_(False)
    student.transformer.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
    total_loss(student(**inputs()), features()).backward()
    reached = gradients(student)
    assert any("transformer_blocks.0.attn.to_q.lora_A" in name for name in reached)
    assert all("lora" in name for name in reached if name.startswith("transformer."))


# Ends


def test_stopped_features_freeze_their_projector_and_remove_their_tap():
    paths = {"early": "transformer_blocks.0", "late": "transformer_blocks.1"}
    transformer = tiny_transformer()
    projectors = {"early": LinearProjector(16, 12), "late": LinearProjector(16, 12)}
    student = AlignedDenoiser(transformer, paths, projectors)
    criterion = AlignmentLoss(
        {
            "early": AlignmentTerm(CosineAlignment(), HardStop(5), tap="early", projector="early"),
            "late": AlignmentTerm(CosineAlignment(), tap="late", projector="late"),
        }
    )
    student.stop_features(set(student.features) - set(criterion.features(5)))
    _, tokens = student(**inputs())
    assert list(tokens) == [("late", "late")]
    criterion(tokens, features(), step=5).loss.backward()
    assert not any(parameter.requires_grad for parameter in projectors["early"].parameters())
    assert all(parameter.grad is not None for parameter in projectors["late"].parameters())
    assert len(transformer.transformer_blocks[0]._forward_hooks) == 0
    resumed = AlignedDenoiser(transformer, paths, projectors, features=criterion.features(5))
    assert resumed.features == (("late", "late"),) and list(resumed.taps) == ["late"]
    assert sum(p.requires_grad for p in resumed.projectors.parameters()) == 2


def test_a_frozen_projector_keeps_its_weights_in_the_module():
    student = tiny_student()
    names = list(student.state_dict())
    student.stop_features(student.features)
    velocity, tokens = student(**inputs())
    assert velocity.shape == (2, 4, 8, 8) and tokens == {}
    assert list(student.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in student.projectors.parameters())


def test_removed_taps_leave_the_transformer_as_it_was():
    student = tiny_student()
    student.remove_taps()
    assert all(not module._forward_hooks for module in student.transformer.modules())


# Files


def test_nothing_leaks_into_the_saved_transformer(tmp_path):
    student = tiny_student()
    names = set(student.transformer.state_dict())
    student.transformer.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == names and not any("projector" in name for name in names)
    assert {name.split(".")[0] for name in student.state_dict()} == {"transformer", "projectors"}
    batch = inputs()
    torch.testing.assert_close(loaded.eval()(**batch).sample, student.eval()(**batch)[0])


def test_projectors_are_saved_one_folder_each_and_loaded_by_name(tmp_path):
    def build() -> AlignedDenoiser:
        projectors = {"dino": MLPProjector(16, 12, 8), "conv": ConvProjector(16, 12), "own": nn.Linear(16, 3)}
        return AlignedDenoiser(tiny_transformer(), "transformer_blocks.0", projectors)

    student, other = build(), build()
    student.save_projectors(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conv", "dino", "own"]
    assert MLPProjector.from_pretrained(tmp_path / "dino").config.hidden_dim == 8
    other.load_projectors(tmp_path)
    for name, value in student.projectors.state_dict().items():
        assert torch.equal(other.projectors.state_dict()[name], value)


@pytest.mark.parametrize(
    ("projectors", "message"),
    [
        ({"a": LinearProjector(16, 12), "b": LinearProjector(16, 12)}, "no projector weights in .*b"),
        ({"a": MLPProjector(16, 12, 8)}, "holds a LinearProjector, but this projector is a MLPProjector"),
        ({"a": LinearProjector(16, 13)}, "linear.weight"),
    ],
)
def test_projectors_that_do_not_fit_change_nothing(projectors, message, tmp_path):
    transformer = tiny_transformer()
    AlignedDenoiser(transformer, "transformer_blocks.0", {"a": LinearProjector(16, 12)}).save_projectors(tmp_path)
    student = AlignedDenoiser(transformer, "transformer_blocks.0", projectors)
    before = {name: value.clone() for name, value in student.projectors.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message):
        student.load_projectors(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in student.projectors.state_dict().items())


# Two processes


def test_two_processes_under_ddp_average_the_gradients_of_the_whole_batch(tmp_path: Path):
    student = plain_student()
    torch.save(student.state_dict(), tmp_path / "weights.pt")
    multiprocessing.spawn(train_one_rank, args=(str(tmp_path),), nprocs=2)
    total_loss(student(*plain_inputs(4, dtype=torch.float64)), features(4, dtype=torch.float64)).backward()
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    expected = gradients(student)
    assert set(found) == set(expected) == {name for name, _ in student.named_parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# The usage that the documentation shows


def test_the_losses_on_a_model_of_your_own(tmp_path: Path):
    from diffusers_srepa import (
        AlignedDenoiser,
        AlignmentLoss,
        CosineAlignment,
        GramMSEAlignment,
        MLPProjector,
        Teacher,
    )

    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56)
    Dinov2Model(config).save_pretrained(tmp_path)
    my_transformer = PlainTransformer(width=1152, num_blocks=8)
    x_t, timestep, labels, step = torch.randn(2, 4, 32, 32), torch.tensor([0.2, 0.7]), torch.tensor([1, 2]), 0
    images = torch.rand(2, 3, 256, 256)

    teacher = Teacher.from_pretrained(str(tmp_path), grid=(16, 16))
    student = AlignedDenoiser(my_transformer, tap="blocks.7", projector=MLPProjector(1152, teacher.feature_dim))
    criterion = AlignmentLoss({"cosine": (CosineAlignment(), 1.0), "gram_mse": (GramMSEAlignment(), 2.0)})
    velocity, tokens = student(x_t, timestep, class_labels=labels)
    alignment = criterion(tokens, teacher(images), step=step)

    assert velocity.shape == x_t.shape
    assert set(alignment.values) == {"cosine", "gram_mse"} and alignment.weights == {"cosine": 1.0, "gram_mse": 2.0}
    torch.testing.assert_close(alignment.loss, alignment.values["cosine"] + 2 * alignment.values["gram_mse"])
    (velocity.square().mean() + alignment.loss).backward()
    assert len(gradients(student)) == len(list(student.parameters()))
    assert all(parameter.grad is None for parameter in teacher.parameters())
