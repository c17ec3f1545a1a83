"""What a new SiT is: sizes of the paper, initial weights of the official code, refused configurations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffusers_srepa.models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from tests.helpers.reference_weights import reference_pos_embed
from tests.helpers.tiny_sit import TINY_CONFIG, tiny_inputs


# Parameters of the official code, position table included: REPA's backbone, then SiT with its sigma channels.
PARAMETERS = {
    "SiT-S/2": (32_957_200, 32_963_360),
    "SiT-S/4": (32_920_384, 32_945_024),
    "SiT-S/8": (33_049_600, 33_148_160),
    "SiT-B/2": (130_500_112, 130_512_416),
    "SiT-B/4": (130_426_432, 130_475_648),
    "SiT-B/8": (130_684_672, 130_881_536),
    "SiT-L/2": (458_086_416, 458_102_816),
    "SiT-L/4": (457_988_160, 458_053_760),
    "SiT-L/8": (458_332_416, 458_594_816),
    "SiT-XL/2": (675_111_184, 675_129_632),
    "SiT-XL/4": (675_000_640, 675_074_432),
    "SiT-XL/8": (675_387_904, 675_683_072),
}
# REG adds these for a class token of width 768, and a zero row of the position table that our model does without.
REG_PARAMETERS = {"SiT-B/2": 1_182_720, "SiT-L/2": 1_576_704, "SiT-XL/2": 1_773_696}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("preset", list(PARAMETERS))
def test_parameter_counts_of_the_paper(preset):
    backbone, with_sigma = PARAMETERS[preset]
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_preset(preset)
        sigma_model = SiTTransformer2DModel.from_preset(preset, out_channels=8)
    assert count(model) + model.pos_embed.numel() == backbone
    assert count(sigma_model) + sigma_model.pos_embed.numel() == with_sigma


@pytest.mark.parametrize("preset", list(REG_PARAMETERS))
def test_parameter_counts_of_a_class_token(preset):
    with torch.device("meta"):
        plain = SiTTransformer2DModel.from_preset(preset)
        model = SiTTransformer2DModel.from_preset(preset, class_token_dim=768)
    assert count(model) - count(plain) == REG_PARAMETERS[preset]


def test_defaults_are_xl_2():
    with torch.device("meta"):
        model = SiTTransformer2DModel()
    preset = SIT_PRESETS["SiT-XL/2"]
    assert {name: model.config[name] for name in preset} == preset
    assert list(SIT_PRESETS) == list(PARAMETERS)


def test_overrides_win_over_the_preset():
    model = SiTTransformer2DModel.from_preset("SiT-S/8", num_layers=1, num_classes=7, sample_size=(16, 32))
    assert len(model.transformer_blocks) == 1
    assert model.label_embed.weight.shape == (8, 384)
    assert model.pos_embed.shape == (1, 2 * 4, 384)


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match="Unknown preset 'SiT-M/2'.*SiT-S/2.*SiT-XL/8"):
        SiTTransformer2DModel.from_preset("SiT-M/2")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_attention_heads": 3, "attention_head_dim": 10}, "is 30, but must be a multiple of 4"),
        ({"sample_size": 9}, "sample_size is 9 x 9, but both sides must be positive multiples of patch_size=2"),
        ({"sample_size": (8, 7)}, "sample_size is 8 x 7"),
        ({"sample_size": 0}, "sample_size is 0 x 0"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob is 1.5, but must be between 0 and 1"),
        ({"class_dropout_prob": -0.1}, "class_dropout_prob is -0.1"),
        ({"class_token_dim": 0}, "class_token_dim is 0"),
        ({"out_channels": 0}, "out_channels is 0"),
        ({"timestep_scale": 0.0}, "timestep_scale is 0.0"),
    ],
)
def test_wrong_configurations_are_refused_in_one_sentence(config, words):
    with pytest.raises(ValueError, match=words):
        SiTTransformer2DModel(**{**TINY_CONFIG, **config})


def test_new_model_returns_zero_and_its_blocks_return_their_input():
    model = SiTTransformer2DModel(**TINY_CONFIG, class_token_dim=6)
    inputs = tiny_inputs()
    hidden = []
    model.transformer_blocks[1].register_forward_hook(lambda module, args, output: hidden.append(output))
    output = model(**inputs, class_token=torch.ones(2, 6))
    assert output.sample.abs().max() == 0
    assert output.class_token.abs().max() == 0
    expected = model.patch_embed(inputs["hidden_states"]) + reference_pos_embed(4, 4, 16)
    torch.testing.assert_close(hidden[0][:, 1:], expected, atol=1e-6, rtol=0)


def test_position_table_has_the_column_first():
    model = SiTTransformer2DModel(**{**TINY_CONFIG, "sample_size": (6, 10), "attention_head_dim": 32})
    torch.testing.assert_close(model.pos_embed, reference_pos_embed(3, 5, 64), atol=1e-7, rtol=0)
    assert model.pos_embed.dtype == torch.float32
    assert "pos_embed" in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())


def test_position_table_at_512_pixels():
    model = SiTTransformer2DModel(**{**TINY_CONFIG, "sample_size": 64})
    torch.testing.assert_close(model.pos_embed, reference_pos_embed(32, 32, 16), atol=1e-7, rtol=0)


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    """All values within the bound, and the largest and the spread near those of the uniform law."""
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.05


def test_initial_weights_follow_the_official_laws():
    torch.manual_seed(0)
    model = SiTTransformer2DModel(
        sample_size=8, num_layers=1, num_attention_heads=4, attention_head_dim=32, qk_norm=True, class_token_dim=48
    )
    dim, block = 128, model.transformer_blocks[0]
    for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
        assert_uniform(layer.weight, math.sqrt(6 / (dim + 3 * dim)))
    assert_uniform(block.attn.to_out[0].weight, math.sqrt(6 / (dim + dim)))
    assert_uniform(block.ff.net[0].proj.weight, math.sqrt(6 / (dim + 4 * dim)))
    assert_uniform(block.ff.net[2].weight, math.sqrt(6 / (dim + 4 * dim)))
    assert_uniform(model.patch_embed.proj.weight, math.sqrt(6 / (dim + 16)))
    assert_uniform(model.class_token_embed.weight, math.sqrt(6 / (dim + 48)))
    for weight in (model.label_embed.weight, model.time_embed.linear_1.weight, model.time_embed.linear_2.weight):
        assert abs(weight.std() / 0.02 - 1) < 0.05
    assert abs(model.label_embed.weight[-1].std() / 0.02 - 1) < 0.2
    for layer in (block.modulation, model.modulation_out, model.proj_out, model.class_token_proj_out):
        assert layer.weight.abs().max() == 0
    for norm in (block.attn.norm_q, block.attn.norm_k, model.class_token_norm):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    for name, parameter in model.named_parameters():
        assert not name.endswith("bias") or parameter.abs().max() == 0, name


def test_initial_weights_are_the_numbers_that_the_official_code_draws():
    """One fused qkv layer, linear layers in the official order, then patches, labels and times."""
    model = SiTTransformer2DModel(**TINY_CONFIG)
    torch.manual_seed(5)
    model.initialize_weights()

    torch.manual_seed(5)
    dim, shapes = 16, [(16, 256), (16, 16)]
    for _ in range(2):
        shapes += [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim), (6 * dim, dim)]
    linears = [nn.init.xavier_uniform_(torch.empty(shape)) for shape in [*shapes, (16, dim), (2 * dim, dim)]]
    patches = nn.init.xavier_uniform_(torch.empty(dim, 16))
    labels = nn.init.normal_(torch.empty(11, dim), std=0.02)
    times = [nn.init.normal_(torch.empty(shape), std=0.02) for shape in ((dim, 256), (dim, dim))]

    for index, block in enumerate(model.transformer_blocks):
        qkv, out, fc1, fc2 = linears[2 + 5 * index : 6 + 5 * index]
        attn = block.attn
        assert torch.equal(torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]), qkv)
        assert torch.equal(attn.to_out[0].weight, out)
        assert torch.equal(block.ff.net[0].proj.weight, fc1)
        assert torch.equal(block.ff.net[2].weight, fc2)
    assert torch.equal(model.patch_embed.proj.weight.flatten(1), patches)
    assert torch.equal(model.label_embed.weight, labels)
    assert torch.equal(model.time_embed.linear_1.weight, times[0])
    assert torch.equal(model.time_embed.linear_2.weight, times[1])


def test_model_made_on_the_meta_device_can_be_initialised_later():
    with torch.device("meta"):
        model = SiTTransformer2DModel(**TINY_CONFIG, qk_norm=True, class_token_dim=6)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.initialize_weights()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    torch.testing.assert_close(model.pos_embed, reference_pos_embed(4, 4, 16), atol=1e-7, rtol=0)
