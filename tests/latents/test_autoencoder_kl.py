import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.latents.loading import load_latent_space
from tests.helpers.tiny_autoencoder import tiny_autoencoder


@pytest.fixture
def latent_space() -> AutoencoderKLLatents:
    return AutoencoderKLLatents(tiny_autoencoder())


def test_shape_and_factors_come_from_the_autoencoder(latent_space):
    assert (latent_space.latent_channels, latent_space.downsample_factor) == (4, 4)
    assert latent_space.scaling_factor == 0.18215
    assert latent_space.shift_factor == 0.0
    assert latent_space.latent_shape(16, 24) == (4, 4, 6)


def test_moments_are_mean_and_standard_deviation_of_the_posterior(latent_space):
    images = torch.rand(2, 3, 16, 24)
    mean, std = latent_space.encode_moments(images)
    parameters = latent_space.vae.quant_conv(latent_space.vae.encoder(images * 2 - 1))
    torch.testing.assert_close(mean, parameters[:, :4])
    torch.testing.assert_close(std, torch.exp(parameters[:, 4:] / 2))
    assert mean.dtype == std.dtype == torch.float32


def test_latent_space_is_frozen_and_gives_no_graph(latent_space):
    assert not latent_space.vae.training
    mean, _ = latent_space.encode_moments(torch.rand(1, 3, 16, 16))
    assert not mean.requires_grad
    assert not mean.is_inference()


def test_sample_scales_and_shifts():
    latent_space = AutoencoderKLLatents(tiny_autoencoder(scaling_factor=2.0, shift_factor=0.5))
    mean, std, noise = (torch.full((1, 4, 2, 2), value) for value in (1.0, 3.0, -0.5))
    # ((1 + 3 * -0.5) - 0.5) * 2
    torch.testing.assert_close(latent_space.sample(mean, std, noise), torch.full((1, 4, 2, 2), -2.0))


def test_decode_undoes_the_scaling():
    latent_space = AutoencoderKLLatents(tiny_autoencoder(scaling_factor=2.0, shift_factor=0.5))
    unscaled = torch.randn(2, 4, 4, 4)
    expected = (latent_space.vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1)
    images = latent_space.decode((unscaled - 0.5) * 2)
    torch.testing.assert_close(images, expected)
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32


def test_autocast_around_the_latent_space_has_no_effect(latent_space):
    images = torch.rand(1, 3, 16, 16)
    plain = latent_space.encode_moments(images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = latent_space.encode_moments(images)[0]
    assert torch.equal(plain, inside)


def test_half_precision_autoencoder_gives_float32_moments():
    latent_space = AutoencoderKLLatents(tiny_autoencoder().to(torch.bfloat16))
    mean, std = latent_space.encode_moments(torch.rand(1, 3, 16, 16))
    assert mean.dtype == std.dtype == torch.float32
    assert latent_space.decode(mean).dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 16, 16), "shape"),
        (torch.zeros(1, 1, 16, 16), "shape"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "divide uint8 by 255"),
        (torch.zeros(1, 3, 18, 16), "multiples of 4"),
        (torch.full((1, 3, 16, 16), -1.0), "from -1 to -1"),
        (torch.full((1, 3, 16, 16), 255.0), "from 255 to 255"),
        (torch.full((1, 3, 16, 16), float("nan")), "nan"),
    ],
)
def test_wrong_images_are_refused(latent_space, images, message):
    with pytest.raises(ValueError, match=message):
        latent_space.encode_moments(images)


def test_wrong_latents_are_refused(latent_space):
    with pytest.raises(ValueError, match=r"\(B, 4, h, w\)"):
        latent_space.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="one shape"):
        latent_space.sample(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(4, 4, 4))


def test_encoder_id_says_what_encodes(latent_space, tmp_path):
    latent_space.vae.save_pretrained(tmp_path)
    reloaded = AutoencoderKLLatents.from_pretrained(tmp_path)
    assert reloaded.encoder_id == latent_space.encoder_id
    assert latent_space.encoder_id.startswith("AutoencoderKL-")
    with torch.no_grad():
        reloaded.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert AutoencoderKLLatents(reloaded.vae).encoder_id != latent_space.encoder_id
    assert AutoencoderKLLatents.from_pretrained(tmp_path, dtype=torch.bfloat16).encoder_id != latent_space.encoder_id


def test_encoder_id_does_not_depend_on_the_decoder(latent_space):
    # sd-vae-ft-mse and sd-vae-ft-ema differ in nothing else.
    other = tiny_autoencoder()
    with torch.no_grad():
        other.decoder.conv_out.weight += 1
    assert AutoencoderKLLatents(other).encoder_id == latent_space.encoder_id
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(
        latent_space.encode_moments(images)[0], AutoencoderKLLatents(other).encode_moments(images)[0]
    )


def test_encoder_id_sees_configuration_that_has_no_weights():
    assert (
        AutoencoderKLLatents(tiny_autoencoder(act_fn="gelu")).encoder_id
        != AutoencoderKLLatents(tiny_autoencoder()).encoder_id
    )


def test_autoencoder_is_found_in_a_pipeline_folder(latent_space, tmp_path):
    latent_space.vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert load_latent_space(tmp_path).encoder_id == latent_space.encoder_id
    assert load_latent_space(str(tmp_path), subfolder="vae").encoder_id == latent_space.encoder_id


def test_dtype_is_float32_unless_asked_for(latent_space, tmp_path):
    latent_space.vae.to(torch.float16).save_pretrained(tmp_path)
    assert AutoencoderKLLatents.from_pretrained(tmp_path).vae.dtype == torch.float32
    assert AutoencoderKLLatents.from_pretrained(tmp_path, dtype=torch.float16).vae.dtype == torch.float16


def test_missing_autoencoder_is_one_sentence(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"the autoencoder .*nothing is neither a local folder.*`name_or_path`"
    ) as error:
        load_latent_space(tmp_path / "nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigurationError, match="no autoencoder was found"):
        load_latent_space(tmp_path, subfolder="vae")
    with pytest.raises(
        ConfigurationError, match="the autoencoder nobody/nothing is neither a local folder nor in the"
    ):
        load_latent_space("nobody/nothing", local_files_only=True)


def test_another_kind_of_autoencoder_is_refused(tmp_path):
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="holds VQModel, but an AutoencoderKL"):
        load_latent_space(tmp_path)


def test_damaged_weights_are_refused(latent_space, tmp_path):
    latent_space.vae.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_latent_space(tmp_path)


def test_incomplete_weights_are_refused(latent_space, tmp_path):
    latent_space.vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["quant_conv.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="lack 1 tensors, the first is quant_conv.bias"):
        load_latent_space(tmp_path)


def test_configuration_without_weights_is_refused(latent_space, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": AutoencoderKL.__name__}))
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_latent_space(tmp_path)
