"""v_repa(x, t, y) = -v_sit(x, 1 - t, y), both sides computed by a plain SiT that shares no code with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from diffusers_srepa.conversion.convert import convert_checkpoint
from diffusers_srepa.conversion.export import export_checkpoint
from diffusers_srepa.conversion.layout import Choices
from diffusers_srepa.conversion.weights import reflect_time, velocity_rows
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from tests.helpers.reference_sit import State, random_state, reference_forward, time_embedding


HEADS = 4
LABELS = torch.tensor([0, 3, 10, 7])  # 10 is the null class
TIMES = (0.0, 0.137, 0.5, 0.9, 1.0)


def repa_state(state: State, folder: Path, vae: str, **choices) -> State:
    """A SiT state dict through converter and back, in REPA's convention."""
    torch.save(state, folder / "sit.pt")
    choices = {"format": "sit", "num_attention_heads": HEADS, **choices}
    convert_checkpoint(folder / "sit.pt", folder / "pipeline", vae=vae, choices=Choices(**choices))
    return torch.load(export_checkpoint(folder / "pipeline", folder / "repa.pt").path)["ema"]


@pytest.mark.parametrize("sigma", [True, False], ids=["learn_sigma", "no_sigma"])
@pytest.mark.parametrize("patch", [2, 4])
def test_velocities_are_opposite_at_reversed_times(tmp_path: Path, vae: str, sigma: bool, patch: int):
    state = random_state(sigma=sigma, patch=patch, seed=patch)
    converted = repa_state(state, tmp_path, vae)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 4, 4 * patch, 4 * patch, generator=generator, dtype=torch.float64)
    for time in TIMES:
        t = torch.full((4,), time, dtype=torch.float64)
        expected, _, _ = reference_forward(state, x, 1 - t, LABELS, HEADS)
        velocity, _, _ = reference_forward(converted, x, t, LABELS, HEADS)
        assert expected.abs().max() > 0.5
        assert (velocity + expected).abs().max() < 1e-12
        wrong, _, _ = reference_forward(converted, x, 1 - t, LABELS, HEADS)
        if time != 0.5:
            assert (wrong + expected).abs().max() > 1e-6


def test_our_model_in_float32(tmp_path: Path, vae: str):
    state = random_state(sigma=True, dtype=torch.float32)
    repa_state(state, tmp_path, vae)
    model = SiTTransformer2DModel.from_pretrained(tmp_path / "pipeline", subfolder="transformer").eval()
    assert model.dtype == torch.float32
    x, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 0.3, 0.8, 1.0])
    exact = {name: value.double() for name, value in state.items()}
    expected, _, _ = reference_forward(exact, x.double(), 1 - t.double(), LABELS, HEADS)
    with torch.no_grad():
        velocity = model(x, 1000 * t, LABELS).sample
    assert (velocity + expected).norm() / expected.norm() < 2e-6


def test_reflection_undoes_itself_and_reverses_the_embedding():
    state = random_state()
    name = "t_embedder.mlp.0.weight"
    twice = reflect_time(reflect_time(state[name]))
    assert (twice - state[name]).abs().max() < 1e-15
    t = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reversed_state = {**state, name: reflect_time(state[name])}
    torch.testing.assert_close(time_embedding(reversed_state, t), time_embedding(state, 1 - t), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reflection_is_rounded_once(dtype: torch.dtype):
    weight = random_state(dtype=torch.float32)["t_embedder.mlp.0.weight"].to(dtype)
    assert reflect_time(weight).dtype == dtype
    assert torch.equal(reflect_time(weight), reflect_time(weight.double()).to(dtype))


def test_sigma_rows_go():
    # Value = 100 * position in the patch + channel.
    rows = torch.tensor([100.0 * position + channel for position in range(4) for channel in range(8)])
    kept = velocity_rows(rows, channels=4, final_channels=8)
    assert kept.tolist() == [100.0 * position + channel for position in range(4) for channel in range(4)]
    assert torch.equal(velocity_rows(rows[:16], channels=4, final_channels=4), rows[:16])


def test_only_three_weights_change(tmp_path: Path, vae: str):
    state = random_state(sigma=True)
    converted = repa_state(state, tmp_path, vae)
    changed = {name for name in state if not torch.equal(state[name], converted[name])}
    assert set(converted) == set(state)
    assert changed == {"t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"}


@pytest.mark.parametrize(("path", "expected"), [("Linear", "linear"), ("GVP", "cosine")])
def test_path_goes_to_the_scheduler(convert, tmp_path: Path, path: str, expected: str):
    args = argparse.Namespace(path_type=path, prediction="velocity", loss_weight=None, cfg_scale=4.0)
    torch.save({"ema": random_state(), "args": args}, tmp_path / "sit.pt")
    result = convert("--checkpoint", tmp_path / "sit.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert result.summary.startswith("SiT") and result.notes == ()
    text = (tmp_path / "out/scheduler/scheduler_config.json").read_text()
    assert f'"path_type": "{expected}"' in text
