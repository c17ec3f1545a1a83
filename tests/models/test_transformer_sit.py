"""The forward pass of SiT: golden values of the official code, conditioning, grids, and refused inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from diffusers_srepa.models.transformer_sit import SiTTimestepEmbedding, sincos_position_table
from tests.helpers.reference_weights import (
    CHANNELS,
    DIM,
    PATCH_SIZE,
    golden_inputs,
    golden_model,
    reference_pos_embed,
    reference_state_dict,
    to_diffusers,
)
from tests.helpers.tiny_sit import tiny_inputs, tiny_sit


# Sum, sum of absolute values, first four and last four entries, printed by the official code.
REPA_VELOCITY = (
    (-19.873128, 102.222430),
    (-0.397159, -0.151139, -0.330209, 0.099741),
    (0.087096, 0.051845, -0.091395, 0.104326),
)
REPA_HIDDEN = (
    (544.722721, 626.426834),
    (-0.036546, 0.105099, 0.168294, 0.064199),
    (1.001133, 0.970526, 0.783914, 0.866379),
)
SIT_VELOCITY = (
    (-27.517991, 123.816803),
    (-0.397159, 0.368304, -0.330209, 0.330022),
    (-0.243500, 0.074144, -0.059011, -0.113932),
)
SIT_MIRRORED_VELOCITY = (
    (-27.517397, 123.770479),
    (-0.398873, 0.369907, -0.332479, 0.332199),
    (-0.243641, 0.074526, -0.058838, -0.113847),
)
REG_VELOCITY = (
    (-19.873266, 102.235913),
    (-0.397180, -0.151151, -0.330244, 0.099716),
    (0.087076, 0.051882, -0.091446, 0.104371),
)
REG_CLASS_VELOCITY = (
    (2.147809, 13.029221),
    (-0.128170, -0.121776, 0.389197, -0.525002),
    (-0.417135, 0.656426, -0.423136, 0.514128),
)


def assert_golden(tensor: torch.Tensor, golden: tuple, tolerance: float = 1e-5) -> None:
    flat = tensor.detach().double().flatten()
    found = torch.stack([flat.sum(), flat.abs().sum(), *flat[:4], *flat[-4:]])
    expected = torch.tensor([value for part in golden for value in part], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_golden_repa_velocity_and_hidden_state():
    model = golden_model("repa")
    hidden = []
    model.transformer_blocks[1].register_forward_hook(lambda module, args, output: hidden.append(output))
    assert_golden(model(**golden_inputs()).sample, REPA_VELOCITY)
    assert_golden(hidden[0], REPA_HIDDEN)


def test_golden_sit_velocity_in_its_own_time_direction():
    model, inputs = golden_model("sit"), golden_inputs()
    assert_golden(model(**inputs).sample[:, :CHANNELS], SIT_VELOCITY)
    inputs["timestep"] = 1000 - inputs["timestep"]
    assert_golden(model(**inputs).sample[:, :CHANNELS], SIT_MIRRORED_VELOCITY)


def test_golden_sit_velocity_with_weights_turned_to_our_time_direction():
    """Sigma dropped, sign turned and time reflected in the weights: v(x, t) = -v_sit(x, 1 - t)."""
    state = to_diffusers(reference_state_dict("sit"))
    weight = state["proj_out.weight"].reshape(PATCH_SIZE**2, 2 * CHANNELS, DIM)
    bias = state["proj_out.bias"].reshape(PATCH_SIZE**2, 2 * CHANNELS)
    state["proj_out.weight"] = -weight[:, :CHANNELS].reshape(-1, DIM)
    state["proj_out.bias"] = -bias[:, :CHANNELS].reshape(-1)
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float64) / 128)
    cosine, sine = frequencies.cos(), frequencies.sin()
    for_cosine, for_sine = state["time_embed.linear_1.weight"].chunk(2, dim=1)
    state["time_embed.linear_1.weight"] = torch.cat(
        [for_cosine * cosine + for_sine * sine, for_cosine * sine - for_sine * cosine], dim=1
    )
    model = golden_model("repa")
    model.load_state_dict(state)
    assert_golden(-model(**golden_inputs()).sample, SIT_MIRRORED_VELOCITY)


def test_golden_reg_velocities():
    output = golden_model("reg")(**golden_inputs(class_token=True))
    assert_golden(output.sample, REG_VELOCITY)
    assert_golden(output.class_token, REG_CLASS_VELOCITY)


def test_golden_velocity_in_float32():
    assert_golden(golden_model("repa", torch.float32)(**golden_inputs(torch.float32)).sample, REPA_VELOCITY, 2e-4)


def test_timestep_embedding_follows_the_plain_formula():
    embedding = SiTTimestepEmbedding(16)
    times = [0.0, 0.25, 0.8, 1.0]
    sinusoids = []
    for time in times:
        angles = [time * math.exp(-math.log(10000.0) * i / 128) for i in range(128)]
        sinusoids.append([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    expected = embedding.linear_2(F.silu(embedding.linear_1(torch.tensor(sinusoids))))
    torch.testing.assert_close(embedding(torch.tensor(times), torch.float32), expected, atol=1e-6, rtol=0)


def test_sinusoid_is_rounded_last_in_a_bfloat16_model():
    """998.7 / 1000 rounds to 1.0 in bfloat16: a sinusoid of the rounded time would be that of another step."""
    model = tiny_sit().bfloat16()
    seen = []
    model.time_embed.linear_1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**{**tiny_inputs(1, dtype=torch.bfloat16), "timestep": torch.tensor([998.7])})
    angles = 0.9987 * torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([angles.cos(), angles.sin()])
    assert seen[0].dtype == torch.bfloat16
    # float32's own error may turn a tie, no more.
    assert (seen[0][0] == expected.bfloat16()).float().mean() > 0.98


@pytest.mark.parametrize(
    "timestep",
    [
        250,
        250.0,
        torch.tensor(250),
        torch.tensor(250.0),
        torch.tensor([250.0]),
        torch.tensor([250, 250]),
        torch.tensor([250.0, 250.0], dtype=torch.float64),
        torch.tensor([250.0, 250.0], dtype=torch.bfloat16),
    ],
)
def test_every_form_of_a_timestep_is_the_same_time(timestep):
    model, inputs = tiny_sit(), tiny_inputs()
    expected = model(**{**inputs, "timestep": torch.tensor([250.0, 250.0])}).sample
    torch.testing.assert_close(model(**{**inputs, "timestep": timestep}).sample, expected, atol=0, rtol=0)


def test_timestep_scale_is_the_unit_of_time():
    inputs = tiny_inputs()
    expected = tiny_sit()(**inputs).sample
    inputs["timestep"] = inputs["timestep"] / 1000
    torch.testing.assert_close(tiny_sit(timestep_scale=1.0)(**inputs).sample, expected)


@pytest.mark.parametrize("training", [False, True])
def test_drop_mask_puts_the_null_class(training):
    model, inputs = tiny_sit().train(training), tiny_inputs()
    mask = torch.tensor([True, False])
    null_labels = torch.tensor([10, inputs["class_labels"][1]])
    keep = torch.zeros(2, dtype=torch.bool)
    expected = model(**{**inputs, "class_labels": null_labels}, class_drop_mask=keep).sample
    kept = model(**inputs, class_drop_mask=keep).sample
    found = model(**inputs, class_drop_mask=mask).sample
    assert torch.equal(found, expected)
    assert not torch.equal(found[0], kept[0])
    assert torch.equal(found[1], kept[1])


def test_training_without_a_mask_drops_labels_with_the_configured_probability():
    model = tiny_sit(class_dropout_prob=0.3, num_layers=1).train()
    inputs = {
        "hidden_states": torch.ones(1000, 4, 2, 2),
        "timestep": 500.0,
        "class_labels": torch.full((1000,), 3),
    }
    torch.manual_seed(0)
    with torch.no_grad():
        sample = model(**inputs).sample
        label = model(**inputs, class_drop_mask=torch.zeros(1000, dtype=torch.bool)).sample[0]
    dropped = (sample - label).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert 0.25 < dropped.float().mean() < 0.35


def test_evaluation_never_drops_labels():
    model, inputs = tiny_sit(class_dropout_prob=1.0), tiny_inputs()
    keep = torch.zeros(2, dtype=torch.bool)
    assert torch.equal(model(**inputs).sample, model(**inputs, class_drop_mask=keep).sample)


def test_model_without_dropout_has_no_null_class():
    model, inputs = tiny_sit(class_dropout_prob=0.0), tiny_inputs()
    assert model.null_class_label is None
    assert model.label_embed.weight.shape[0] == 10
    expected = model(**inputs).sample
    assert torch.equal(model.train()(**inputs).sample, expected)
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        model(**inputs, class_drop_mask=torch.tensor([True, False]))


@pytest.mark.parametrize("num_classes", [1, 3, 1234])
def test_null_class_follows_the_number_of_classes(num_classes):
    model = tiny_sit(num_classes=num_classes)
    assert model.null_class_label == num_classes
    assert model.label_embed.weight.shape[0] == num_classes + 1
    inputs = tiny_inputs()
    first = {**inputs, "class_labels": torch.tensor([0, 0])}
    null = {**inputs, "class_labels": torch.tensor([num_classes, num_classes])}
    dropped = model(**first, class_drop_mask=torch.tensor([True, True])).sample
    assert torch.equal(dropped, model(**null).sample)
    assert not torch.equal(dropped, model(**first).sample)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_labels_of_any_whole_number_dtype(dtype):
    model, inputs = tiny_sit(num_classes=300), tiny_inputs()
    mask = torch.tensor([True, False])
    expected = model(**inputs, class_drop_mask=mask).sample
    inputs["class_labels"] = inputs["class_labels"].to(dtype)
    assert torch.equal(model(**inputs, class_drop_mask=mask).sample, expected)


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (6, 10), (16, 16), (2, 2)])
def test_other_grids_equal_a_model_of_that_native_size(size):
    model, native = tiny_sit(), tiny_sit(sample_size=size)
    inputs = tiny_inputs(size=size)
    sample = model(**inputs).sample
    assert sample.shape == inputs["hidden_states"].shape
    torch.testing.assert_close(sample, native(**inputs).sample, atol=1e-5, rtol=1e-5)


def test_positions_of_a_rectangle_are_a_corner_of_the_square():
    square = reference_pos_embed(16, 16, 32).reshape(16, 16, 32)
    table = sincos_position_table(5, 11, 32)
    torch.testing.assert_close(table.reshape(5, 11, 32), square[:5, :11], atol=3e-6, rtol=0)


def test_pixels_of_a_rectangle_depend_on_their_own_patch_when_blocks_are_off():
    """With the gates at zero, an output patch sees only the input patch of its own place."""
    model = tiny_sit()
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.modulation.weight)
        torch.nn.init.zeros_(block.modulation.bias)
    latents = tiny_inputs(1, (4, 8))["hidden_states"].requires_grad_()
    sample = model(latents, 300.0, torch.tensor([2])).sample
    sample[0, :, 2:4, 4:6].sum().backward()
    touched = latents.grad[0].abs().sum(dim=0) > 0
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(touched, expected)


def test_out_channels_widen_the_velocity_only():
    inputs = tiny_inputs()
    assert tiny_sit(out_channels=8)(**inputs).sample.shape == (2, 8, 8, 8)
    assert tiny_sit(in_channels=4, patch_size=4)(**inputs).sample.shape == (2, 4, 8, 8)


def test_training_step_at_512_pixels():
    model = tiny_sit(sample_size=64).train()
    inputs = tiny_inputs(1, (64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = torch.zeros_like(inputs["hidden_states"])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        sample = model(**inputs, class_drop_mask=torch.zeros(1, dtype=torch.bool)).sample
        loss = F.mse_loss(sample, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model.pos_embed.shape == (1, 1024, 16)
    assert losses[2] < losses[1] < losses[0]


def test_class_token_meets_the_patches():
    model, inputs = tiny_sit(class_token_dim=6), tiny_inputs()
    token = torch.linspace(-1, 1, 12).reshape(2, 6)
    output = model(**inputs, class_token=token)
    assert output.sample.shape == (2, 4, 8, 8)
    assert output.class_token.shape == (2, 6)
    other = model(**inputs, class_token=-token)
    assert not torch.allclose(other.sample, output.sample)
    wide = model(**tiny_inputs(size=(4, 16)), class_token=token)
    assert wide.sample.shape == (2, 4, 4, 16)


def test_class_token_is_absent_by_default():
    output = tiny_sit()(**tiny_inputs())
    assert output.class_token is None
    assert list(output.keys()) == ["sample"]


@pytest.mark.parametrize(
    ("config", "wrong", "words"),
    [
        ({}, {"hidden_states": torch.zeros(2, 4, 7, 8)}, "7 x 8, but both sides must be multiples of patch_size=2"),
        ({}, {"hidden_states": torch.zeros(2, 3, 8, 8)}, "in_channels = 4"),
        ({}, {"hidden_states": torch.zeros(4, 8, 8)}, r"must have shape \(B, C, H, W\)"),
        ({}, {"class_labels": torch.zeros(2)}, "class_labels have shape .2,. and dtype torch.float32"),
        ({}, {"class_labels": torch.zeros(2, dtype=torch.bool)}, "class_labels .* torch.bool"),
        ({}, {"class_labels": torch.zeros(3, dtype=torch.long)}, r"whole numbers of shape \(2,\)"),
        ({}, {"class_labels": torch.zeros(2, 1, dtype=torch.long)}, r"whole numbers of shape \(2,\)"),
        ({}, {"timestep": torch.zeros(3)}, r"timestep has shape \(3,\)"),
        ({}, {"timestep": torch.zeros(2, 1)}, r"timestep has shape \(2, 1\)"),
        ({}, {"class_drop_mask": torch.zeros(2)}, "class_drop_mask .* must be bool"),
        ({}, {"class_drop_mask": torch.zeros(3, dtype=torch.bool)}, r"bool of shape \(2,\)"),
        ({}, {"class_token": torch.zeros(2, 6)}, "shape .2, 6., but a model with class_token_dim=None takes none"),
        (
            {"class_token_dim": 6},
            {},
            "Found no class_token, but a model with class_token_dim=6 takes one of shape .2, 6.",
        ),
        (
            {"class_token_dim": 6},
            {"class_token": torch.zeros(2, 5)},
            "class_token of shape .2, 5., but .* one of shape .2, 6.",
        ),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(config, wrong, words):
    model = tiny_sit(**config)
    with pytest.raises(ValueError, match=words):
        model(**{**tiny_inputs(), **wrong})
