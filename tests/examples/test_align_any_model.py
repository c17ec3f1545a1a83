"""The example for models of diffusers that are not ours: it trains, and its models keep what the page promises."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramMSEAlignment
from diffusers_srepa.alignment.projectors import ConvProjector, LinearProjector, MLPProjector
from diffusers_srepa.tokens import TeacherFeatures


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "align_any_model.py"
KEY = ("default", "default")
TEACHER_DIM = 12
CLASSES = {"dit": DiTTransformer2DModel, "unet": UNet2DModel}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("align_any_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    # Accelerate keeps precision and device for the whole process; every test starts its own run.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def printed_losses(output: str) -> list[dict[str, float]]:
    """The lines about losses, oldest first."""
    lines = [line for line in output.splitlines() if line.startswith("steps ")]
    return [{name: float(value) for name, value in re.findall(r"(\w+) ([+-][\d.]+)", line)} for line in lines]


def run_script(script: ModuleType, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, float]]:
    script.train(script.parse_arguments([*options, "--cpu", "--log_every", "10"]))
    return printed_losses(capsys.readouterr().out)


def build(script: ModuleType, kind: str, dtype: torch.dtype = torch.float32) -> tuple[AlignedDenoiser, dict[str, Any]]:
    """The example's student without random labels, and a batch for it."""
    torch.manual_seed(0)
    shape = {"dit": (4, 8, 8), "unet": (3, 32, 32)}[kind]
    model, tap, width, grid = (script.build_dit if kind == "dit" else script.build_unet)(shape)
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    student = AlignedDenoiser(model, tap, MLPProjector(width, TEACHER_DIM, hidden_dim=16)).to(dtype)
    batch = {
        "x_t": torch.randn(2, *shape, dtype=dtype),
        "timestep": torch.tensor([100.5, 900.0], dtype=dtype),
        "class_labels": torch.tensor([3, 0]),
        "features": TeacherFeatures(torch.randn(2, grid[0] * grid[1], TEACHER_DIM, dtype=dtype), grid),
    }
    return student, batch


def total_loss(student: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    prediction, tokens = student(batch["x_t"], batch["timestep"], class_labels=batch["class_labels"])
    criterion = AlignmentLoss({"cosine": (CosineAlignment(), 1.0), "gram_mse": (GramMSEAlignment(), 2.0)})
    return prediction[:, : batch["x_t"].shape[1]].square().mean() + criterion(tokens, batch["features"]).loss


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


# The script


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_losses_fall_and_an_ordinary_model_is_saved(kind, script, capsys, tmp_path):
    losses = run_script(
        script, capsys, "--model", kind, "--steps", "30", "--batch_size", "16", "--output_dir", str(tmp_path)
    )
    assert len(losses) == 3 and set(losses[0]) == {"flow", "cosine", "gram_mse"}
    assert losses[-1]["flow"] < 0.9 * losses[0]["flow"]
    assert losses[-1]["cosine"] < losses[0]["cosine"] - 0.2
    assert losses[-1]["gram_mse"] < 0.7 * losses[0]["gram_mse"]

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([kind, "projectors"])
    assert json.loads((tmp_path / kind / "config.json").read_text())["_class_name"] == CLASSES[kind].__name__
    model, report = CLASSES[kind].from_pretrained(tmp_path / kind, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    projector = MLPProjector.from_pretrained(tmp_path / "projectors" / "default")
    assert projector.config.out_dim == 96


def test_mixed_precision_trains_like_full_precision(script, capsys):
    options = ("--model", "dit", "--steps", "10", "--batch_size", "8")
    full = run_script(script, capsys, *options)[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    dtypes: set[torch.dtype] = set()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: dtypes.add(output.dtype) if isinstance(module, nn.Linear) else None
    )
    try:
        mixed = run_script(script, capsys, *options, "--mixed_precision", "bf16")[0]
    finally:
        handle.remove()
    assert torch.bfloat16 in dtypes
    assert mixed == pytest.approx(full, rel=0.02, abs=0.01)


def test_a_rest_of_steps_is_reported_too(script, capsys):
    losses = run_script(script, capsys, "--steps", "2", "--batch_size", "4")
    assert len(losses) == 1


@pytest.mark.parametrize("size", ["0", "100000", "-4"])
def test_a_batch_that_cannot_be_filled_is_refused(size, script):
    with pytest.raises(SystemExit, match=rf"--batch_size is {size} on 1 process\(es\), but must be from 1 to \d+"):
        script.train(script.parse_arguments(["--batch_size", size, "--steps", "1", "--cpu"]))


def test_the_script_runs_as_the_page_says():
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", "unet", "--steps", "1", "--batch_size", "4", "--cpu"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert len(printed_losses(result.stdout)) == 1


# What the page says about DiT and U-Nets


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_prediction_and_tokens(kind, script):
    student, batch = build(script, kind)
    prediction, tokens = student(batch["x_t"], batch["timestep"], class_labels=batch["class_labels"])
    plain = student.transformer(batch["x_t"], batch["timestep"], class_labels=batch["class_labels"]).sample
    assert torch.equal(prediction, plain)
    assert prediction.shape[1] == {"dit": 8, "unet": 3}[kind]
    assert tokens[KEY].grid == (4, 4) and tokens[KEY].dim == TEACHER_DIM
    other = student(batch["x_t"], batch["timestep"], class_labels=torch.tensor([4, 0]))[1][KEY].tokens
    assert not torch.allclose(other[0], tokens[KEY].tokens[0]) and torch.allclose(other[1], tokens[KEY].tokens[1])


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_every_parameter_gets_a_gradient_with_and_without_checkpointing(kind, script):
    plain, batch = build(script, kind, torch.float64)
    checkpointed = copy.deepcopy(plain).train()
    checkpointed.transformer.enable_gradient_checkpointing()
    for student in (plain.train(), checkpointed):
        total_loss(student, batch).backward()
    expected, found = gradients(plain), gradients(checkpointed)
    assert set(expected) == set(found) == {name for name, _ in plain.named_parameters()}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_compiles_without_graph_breaks(kind):
    # Smaller than the example's: compilation takes its time per layer.
    model: nn.Module
    if kind == "dit":
        model = DiTTransformer2DModel(2, 8, in_channels=3, num_layers=2, sample_size=8, num_embeds_ada_norm=10).eval()
        student = AlignedDenoiser(model, "transformer_blocks.0", LinearProjector(16, TEACHER_DIM))
    else:
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        channels = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_class_embeds": 10}
        model = UNet2DModel(sample_size=8, **blocks, **channels, layers_per_block=1, add_attention=False)
        student = AlignedDenoiser(model, "mid_block", LinearProjector(16, TEACHER_DIM))
    batch = {
        "x_t": torch.randn(2, 3, 8, 8),
        "timestep": torch.tensor([100.5, 900.0]),
        "class_labels": torch.tensor([3, 0]),
        "features": TeacherFeatures(torch.randn(2, 16, TEACHER_DIM), (4, 4)),
    }
    loss = total_loss(student, batch)
    loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(student).items()}
    student.zero_grad()
    compiled_loss = total_loss(torch.compile(student, backend="aot_eager", fullgraph=True), batch)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss)
    found = gradients(student)
    assert set(found) == set(expected) == {name for name, _ in student.named_parameters()}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_runs_in_bfloat16_as_a_whole(kind, script):
    student, batch = build(script, kind)
    student.transformer.to(torch.bfloat16)
    prediction, tokens = student(batch["x_t"].bfloat16(), batch["timestep"], class_labels=batch["class_labels"])
    assert prediction.dtype == torch.bfloat16 and tokens[KEY].tokens.dtype == torch.float32


@pytest.mark.parametrize(
    ("tap", "grid"), [("mid_block", (4, 6)), ("down_blocks.1", (8, 12)), ("up_blocks.0", (8, 12))]
)
def test_maps_of_a_unet_and_rectangles(tap, grid, script):
    unet, _, _, _ = script.build_unet((3, 32, 32))
    width = {"mid_block": 64, "down_blocks.1": 16, "up_blocks.0": 64}[tap]
    student = AlignedDenoiser(unet, tap, ConvProjector(width, TEACHER_DIM))
    _, tokens = student(torch.randn(1, 3, 32, 48), 500, class_labels=torch.tensor([1]))
    assert tokens[KEY].grid == grid


def test_middle_block_of_a_conditional_unet():
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=8,
    )
    student = AlignedDenoiser(unet, "mid_block", LinearProjector(16, TEACHER_DIM))
    prediction, tokens = student(torch.randn(2, 4, 16, 16), 500, encoder_hidden_states=torch.randn(2, 5, 12))
    assert prediction.shape == (2, 4, 16, 16) and tokens[KEY].grid == (8, 8)
    seen: list[torch.Tensor] = []
    unet.mid_block.register_forward_hook(lambda block, args, output: seen.append(output))
    _, tokens = student(torch.randn(2, 4, 16, 16), 500, encoder_hidden_states=torch.randn(2, 5, 12))
    row_major = seen[0].permute(0, 2, 3, 1).reshape(2, 64, 16)
    torch.testing.assert_close(tokens[KEY].tokens, student.projectors["default"](row_major))
