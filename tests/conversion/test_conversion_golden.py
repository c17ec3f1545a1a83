"""Golden values of the official code through the whole converter: a file, a folder, a loaded pipeline, one forward."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from diffusers_srepa.alignment.projectors import ConvProjector, MLPProjector
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.tokens import TokenMap
from tests.helpers.reference_weights import GRID, golden_inputs, projector_state_dict, reference_state_dict


Golden = tuple[float, float, tuple[float, ...], tuple[float, ...]]
REPA_V: Golden = (-19.873128, 102.222430, (-0.397159, -0.151139, -0.330209, 0.099741),
                  (0.087096, 0.051845, -0.091395, 0.104326))  # fmt: skip
HIDDEN: Golden = (544.722721, 626.426834, (-0.036546, 0.105099, 0.168294, 0.064199),
                  (1.001133, 0.970526, 0.783914, 0.866379))  # fmt: skip
MLP: Golden = (44.705307, 45.225960, (0.131409, 0.092182, 0.053155, 0.174302),
               (0.125761, 0.037560, 0.031720, 0.095858))  # fmt: skip
CONV: Golden = (-55.356223, 132.384856, (0.098660, 0.057303, 0.013008, -0.031778),
                (-0.123291, -0.107061, -0.088604, -0.069434))  # fmt: skip
SIT_REVERSED: Golden = (-27.517397, 123.770479, (-0.398873, 0.369907, -0.332479, 0.332199),
                        (-0.243641, 0.074526, -0.058838, -0.113847))  # fmt: skip
SIT_GUIDED: Golden = (-13.760159, 66.145819, (-0.408396, 0.376709, -0.360223, 0.356524),
                      (-0.224775, 0.054054, -0.043947, -0.130359))  # fmt: skip
REG_V: Golden = (-19.873266, 102.235913, (-0.397180, -0.151151, -0.330244, 0.099716),
                 (0.087076, 0.051882, -0.091446, 0.104371))  # fmt: skip
REG_TOKEN: Golden = (2.147809, 13.029221, (-0.128170, -0.121776, 0.389197, -0.525002),
                     (-0.417135, 0.656426, -0.423136, 0.514128))  # fmt: skip
REG_PROJECTION: Golden = (47.479796, 48.001133, (0.125792, 0.090289, 0.062092, 0.160523),
                          (0.125766, 0.037558, 0.031717, 0.095865))  # fmt: skip

pytestmark = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def check(value: torch.Tensor, golden: Golden) -> None:
    """Every printed digit; sums have up to 512 entries."""
    flat = value.detach().double().flatten()
    total, absolute, first, last = golden
    torch.testing.assert_close(flat[:4], torch.tensor(first, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat[-4:], torch.tensor(last, dtype=torch.float64), atol=1e-5, rtol=0)
    assert flat.sum().item() == pytest.approx(total, abs=1e-4)
    assert flat.abs().sum().item() == pytest.approx(absolute, abs=1e-4)


def load(convert, tmp_path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype, *options: str) -> SiTPipeline:
    file = tmp_path / "0400000.pt"
    content = {"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(global_seed=0), "steps": 400000}
    torch.save(content, file)
    convert("--checkpoint", file, "--output_dir", tmp_path / "out", "--num_attention_heads", 4, *options)
    pipe = SiTPipeline.from_pretrained(tmp_path / "out", dtype=dtype)
    assert pipe.transformer.dtype == dtype
    return pipe


def tapped(pipe: SiTPipeline, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None, TokenMap]:
    """Velocity, that of the class token, and the tokens after block 2."""
    found = []
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(lambda *args: found.append(args[2]))
    with torch.no_grad():
        output = pipe.transformer(**inputs)
    handle.remove()
    return output.sample, output.class_token, TokenMap(found[0], GRID, found[0].shape[1] - 16)


def test_repa_with_its_projector(convert, tmp_path: Path, dtype: torch.dtype):
    state = reference_state_dict("repa", dtype) | projector_state_dict("mlp", dtype)
    pipe = load(convert, tmp_path, state, dtype)
    velocity, _, tokens = tapped(pipe, golden_inputs(dtype))
    check(velocity, REPA_V)
    check(tokens.tokens, HIDDEN)
    projector = MLPProjector.from_pretrained(tmp_path / "out/projectors/default", dtype=dtype)
    check(projector(tokens).tokens, MLP)
    assert pipe.config.guidance_channels is None


def test_irepa_with_its_convolution(convert, tmp_path: Path, dtype: torch.dtype):
    state = reference_state_dict("repa", dtype) | projector_state_dict("conv", dtype)
    pipe = load(convert, tmp_path, state, dtype)
    velocity, _, tokens = tapped(pipe, golden_inputs(dtype))
    check(velocity, REPA_V)
    projector = ConvProjector.from_pretrained(tmp_path / "out/projectors/default", dtype=dtype)
    assert projector.config.kernel_size == 3
    check(projector(tokens).tokens, CONV)


def test_sit_runs_the_other_way_round(convert, tmp_path: Path, dtype: torch.dtype):
    pipe = load(convert, tmp_path, reference_state_dict("sit", dtype), dtype)
    with torch.no_grad():
        velocity = pipe.transformer(**golden_inputs(dtype)).sample
    check(-velocity, SIT_REVERSED)
    assert pipe.transformer.config.out_channels is None and pipe.config.guidance_channels == 3


def test_sit_is_guided_as_by_its_own_sampler(convert, tmp_path: Path, dtype: torch.dtype):
    pipe = load(convert, tmp_path, reference_state_dict("sit", dtype), dtype)
    latent = golden_inputs(dtype)["hidden_states"][:1]
    # SiT's t = 0.25 is t = 0.75 here.
    inputs = {"hidden_states": latent.repeat(2, 1, 1, 1), "timestep": 750.0, "class_labels": torch.tensor([3, 10])}
    with torch.no_grad():
        conditional, unconditional = -pipe.transformer(**inputs).sample
    guided = conditional.clone()
    channels = pipe.config.guidance_channels
    guided[:channels] = unconditional[:channels] + 4 * (conditional - unconditional)[:channels]
    check(guided, SIT_GUIDED)


def test_reg_with_its_class_token(convert, tmp_path: Path, dtype: torch.dtype):
    state = reference_state_dict("reg", dtype) | projector_state_dict("mlp", dtype)
    pipe = load(convert, tmp_path, state, dtype)
    velocity, token_velocity, tokens = tapped(pipe, golden_inputs(dtype, class_token=True))
    check(velocity, REG_V)
    check(token_velocity, REG_TOKEN)
    assert tokens.num_prefix_tokens == 1
    projector = MLPProjector.from_pretrained(tmp_path / "out/projectors/default", dtype=dtype)
    check(projector(tokens).tokens, REG_PROJECTION)
