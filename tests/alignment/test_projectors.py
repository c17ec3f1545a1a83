"""Projectors: sizes, initialisation, geometry, and the way to disk and back."""

import inspect
import json

import pytest
import torch
from torch import nn

from diffusers_srepa.alignment.projectors import ConvProjector, LinearProjector, MLPProjector
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.tokens import TokenMap


@pytest.mark.parametrize(
    ("projector", "num_parameters"),
    [
        (lambda: MLPProjector(768, 768), 7_344_896),
        (lambda: MLPProjector(384, 768), 6_558_464),
        (lambda: MLPProjector(1024, 1024), 8_393_728),
        (lambda: ConvProjector(768, 768), 5_309_184),
        (lambda: ConvProjector(1152, 768, kernel_size=1), 885_504),
        (lambda: LinearProjector(1152, 768), 1152 * 768 + 768),
    ],
)
def test_parameter_counts_of_the_papers(projector, num_parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in projector().parameters()) == num_parameters


@pytest.mark.parametrize("projector", [MLPProjector(64, 32, hidden_dim=256), LinearProjector(64, 32)])
def test_linear_layers_start_xavier_uniform_with_zero_bias(projector):
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert 0.97 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert not layer.bias.any()


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolutions_keep_the_initialisation_of_pytorch(kernel_size):
    torch.manual_seed(3)
    projector = ConvProjector(64, 32, kernel_size)
    torch.manual_seed(3)
    reference = nn.Conv2d(64, 32, kernel_size, padding=kernel_size // 2)
    assert torch.equal(projector.conv.weight, reference.weight)
    assert torch.equal(projector.conv.bias, reference.bias)
    assert projector.conv.bias.any()


@pytest.mark.parametrize("projector", [MLPProjector(6, 5, hidden_dim=8), LinearProjector(6, 5)])
def test_per_token_projectors_take_maps_and_plain_tokens_alike(projector):
    tokens = torch.randn(2, 1 + 6, 6)
    projected = projector(TokenMap(tokens, (2, 3), num_prefix_tokens=1))
    assert projected.grid == (2, 3) and projected.num_prefix_tokens == 1
    assert torch.equal(projected.tokens, projector(tokens))
    torch.testing.assert_close(projected.tokens[:, 3], projector(tokens[:, 3]))


def test_convolution_runs_over_rows_and_columns_of_the_grid_with_zero_padding():
    projector = ConvProjector(4, 3)
    tokens = torch.randn(2, 10, 4)
    weight, bias = projector.conv.weight, projector.conv.bias
    projected = projector(TokenMap(tokens, (2, 5)))
    assert projected.grid == (2, 5) and projected.tokens.shape == (2, 10, 3)
    for row, column in ((0, 0), (1, 3), (0, 4)):
        expected = bias.expand(2, 3)
        for i in range(3):
            for j in range(3):
                r, c = row + i - 1, column + j - 1
                if 0 <= r < 2 and 0 <= c < 5:
                    expected = expected + tokens[:, r * 5 + c] @ weight[:, :, i, j].T
        torch.testing.assert_close(projected.tokens[:, row * 5 + column], expected)


def test_convolution_sees_patch_tokens_only():
    projector = ConvProjector(4, 3)
    tokens = torch.randn(2, 1 + 6, 4)
    projected = projector(TokenMap(tokens, (2, 3), num_prefix_tokens=1))
    assert projected.num_prefix_tokens == 0
    assert torch.equal(projected.tokens, projector(TokenMap(tokens[:, 1:], (2, 3))).tokens)
    with pytest.raises(ValueError, match="needs the token grid"):
        projector(tokens)


@pytest.mark.parametrize(
    "projector",
    [MLPProjector(6, 5, hidden_dim=8), LinearProjector(6, 5), ConvProjector(6, 5), ConvProjector(6, 5, kernel_size=1)],
)
def test_saves_its_class_and_configuration_and_comes_back(projector, tmp_path):
    projector.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == type(projector).__name__ and config["in_dim"] == 6 and config["out_dim"] == 5
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = type(projector).from_pretrained(tmp_path)
    for name, value in projector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    sizes = inspect.signature(type(projector)).parameters
    assert {name: loaded.config[name] for name in sizes} == {name: projector.config[name] for name in sizes}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLPProjector(0, 4), "in_dim is 0"),
        (lambda: MLPProjector(4, 4, hidden_dim="wide"), "hidden_dim is 'wide'"),
        (lambda: LinearProjector(4, -1), "out_dim is -1"),
        (lambda: ConvProjector(4, 4, kernel_size=2), "must be odd"),
        (lambda: ConvProjector(4, 4, kernel_size=0), "kernel_size is 0"),
    ],
)
def test_refuses_sizes_that_cannot_work(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
