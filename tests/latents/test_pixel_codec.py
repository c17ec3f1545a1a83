import pytest
import torch

from diffusers_srepa.latents.build import load_codec
from diffusers_srepa.latents.codec import scale_latents, unscale_latents
from diffusers_srepa.latents.pixels import PixelCodec


def test_pixels_are_mapped_to_minus_one_to_one():
    mean, std = PixelCodec().encode_moments(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1))
    assert mean.flatten().tolist() == [-1, 0, 1]
    assert std.flatten().tolist() == [0, 0, 0]


def test_round_trip_is_exact_and_ignores_the_noise():
    codec = PixelCodec()
    images = torch.randint(0, 256, (2, 3, 5, 7)) / 255
    mean, std = codec.encode_moments(images)
    decoded = codec.decode(codec.sample(mean, std, torch.randn_like(mean)))
    assert torch.equal((decoded * 255).round(), (images * 255).round())


def test_decode_clamps():
    assert PixelCodec().decode(torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1)).flatten().tolist() == [0, 0.5, 1]


def test_pixels_are_a_codec_by_name():
    codec = load_codec("pixels")
    assert isinstance(codec, PixelCodec)
    assert codec.codec_id == "pixels"
    assert codec.latent_shape(5, 7) == (3, 5, 7)
    assert codec.to("cpu") is codec


def test_empty_images_have_no_latent():
    with pytest.raises(ValueError, match="0 x 7"):
        PixelCodec().latent_shape(0, 7)


def test_scaling_pair():
    latents = torch.tensor([1.5])
    assert scale_latents(latents, 0.25, 0.5).item() == 0.25
    assert unscale_latents(torch.tensor([0.25]), 0.25, 0.5).item() == 1.5
