import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLCodec
from diffusers_srepa.latents.build import load_codec
from tests.helpers.tiny_autoencoder import tiny_autoencoder


@pytest.fixture
def codec() -> AutoencoderKLCodec:
    return AutoencoderKLCodec(tiny_autoencoder())


def test_shape_and_factors_come_from_the_autoencoder(codec):
    assert (codec.latent_channels, codec.downsample_factor) == (4, 4)
    assert codec.scaling_factor == 0.18215
    assert codec.shift_factor == 0.0
    assert codec.latent_shape(16, 24) == (4, 4, 6)


def test_moments_are_mean_and_standard_deviation_of_the_posterior(codec):
    images = torch.rand(2, 3, 16, 24)
    mean, std = codec.encode_moments(images)
    parameters = codec.vae.quant_conv(codec.vae.encoder(images * 2 - 1))
    torch.testing.assert_close(mean, parameters[:, :4])
    torch.testing.assert_close(std, torch.exp(parameters[:, 4:] / 2))
    assert mean.dtype == std.dtype == torch.float32


def test_codec_is_frozen_and_gives_no_graph(codec):
    assert not codec.vae.training
    mean, _ = codec.encode_moments(torch.rand(1, 3, 16, 16))
    assert not mean.requires_grad
    assert not mean.is_inference()


def test_sample_scales_and_shifts():
    codec = AutoencoderKLCodec(tiny_autoencoder(scaling_factor=2.0, shift_factor=0.5))
    mean, std, noise = (torch.full((1, 4, 2, 2), value) for value in (1.0, 3.0, -0.5))
    # ((1 + 3 * -0.5) - 0.5) * 2
    torch.testing.assert_close(codec.sample(mean, std, noise), torch.full((1, 4, 2, 2), -2.0))


def test_decode_undoes_the_scaling():
    codec = AutoencoderKLCodec(tiny_autoencoder(scaling_factor=2.0, shift_factor=0.5))
    unscaled = torch.randn(2, 4, 4, 4)
    expected = (codec.vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1)
    images = codec.decode((unscaled - 0.5) * 2)
    torch.testing.assert_close(images, expected)
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32


def test_autocast_around_the_codec_has_no_effect(codec):
    images = torch.rand(1, 3, 16, 16)
    plain = codec.encode_moments(images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = codec.encode_moments(images)[0]
    assert torch.equal(plain, inside)


def test_half_precision_autoencoder_gives_float32_moments():
    codec = AutoencoderKLCodec(tiny_autoencoder().to(torch.bfloat16))
    mean, std = codec.encode_moments(torch.rand(1, 3, 16, 16))
    assert mean.dtype == std.dtype == torch.float32
    assert codec.decode(mean).dtype == torch.float32


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
def test_wrong_images_are_refused(codec, images, message):
    with pytest.raises(ValueError, match=message):
        codec.encode_moments(images)


def test_wrong_latents_are_refused(codec):
    with pytest.raises(ValueError, match=r"\(B, 4, h, w\)"):
        codec.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="one shape"):
        codec.sample(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(4, 4, 4))


def test_codec_id_says_what_encodes(codec, tmp_path):
    codec.vae.save_pretrained(tmp_path)
    reloaded = AutoencoderKLCodec.from_pretrained(tmp_path)
    assert reloaded.codec_id == codec.codec_id
    assert codec.codec_id.startswith("AutoencoderKL-")
    with torch.no_grad():
        reloaded.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert AutoencoderKLCodec(reloaded.vae).codec_id != codec.codec_id
    assert AutoencoderKLCodec.from_pretrained(tmp_path, dtype=torch.bfloat16).codec_id != codec.codec_id


def test_codec_id_does_not_depend_on_the_decoder(codec):
    # sd-vae-ft-mse and sd-vae-ft-ema differ in nothing else.
    other = tiny_autoencoder()
    with torch.no_grad():
        other.decoder.conv_out.weight += 1
    assert AutoencoderKLCodec(other).codec_id == codec.codec_id
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(codec.encode_moments(images)[0], AutoencoderKLCodec(other).encode_moments(images)[0])


def test_codec_id_sees_configuration_that_has_no_weights():
    assert (
        AutoencoderKLCodec(tiny_autoencoder(act_fn="gelu")).codec_id != AutoencoderKLCodec(tiny_autoencoder()).codec_id
    )


def test_autoencoder_is_found_in_a_pipeline_folder(codec, tmp_path):
    codec.vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert load_codec(tmp_path).codec_id == codec.codec_id
    assert load_codec(str(tmp_path), subfolder="vae").codec_id == codec.codec_id


def test_dtype_is_float32_unless_asked_for(codec, tmp_path):
    codec.vae.to(torch.float16).save_pretrained(tmp_path)
    assert AutoencoderKLCodec.from_pretrained(tmp_path).vae.dtype == torch.float32
    assert AutoencoderKLCodec.from_pretrained(tmp_path, dtype=torch.float16).vae.dtype == torch.float16


def test_missing_autoencoder_is_one_sentence(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no autoencoder was found at .*latents.vae") as error:
        load_codec(tmp_path / "nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigurationError, match="no autoencoder was found"):
        load_codec(tmp_path, subfolder="vae")
    with pytest.raises(ConfigurationError, match="no autoencoder was found at nobody/nothing"):
        load_codec("nobody/nothing", local_files_only=True)


def test_another_kind_of_autoencoder_is_refused(tmp_path):
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="holds VQModel, but an AutoencoderKL"):
        load_codec(tmp_path)


def test_damaged_weights_are_refused(codec, tmp_path):
    codec.vae.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_codec(tmp_path)


def test_incomplete_weights_are_refused(codec, tmp_path):
    codec.vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["quant_conv.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="lack 1 tensors, the first is quant_conv.bias"):
        load_codec(tmp_path)


def test_configuration_without_weights_is_refused(codec, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": AutoencoderKL.__name__}))
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_codec(tmp_path)
