import pytest
import torch

from diffusers_srepa.latents.loading import load_latent_space
from diffusers_srepa.latents.pixels import PixelLatents


def test_pixels_are_mapped_to_minus_one_to_one():
    mean, std = PixelLatents().encode_moments(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1))
    assert mean.flatten().tolist() == [-1, 0, 1]
    assert std.flatten().tolist() == [0, 0, 0]


def test_round_trip_is_exact_and_ignores_the_noise():
    latent_space = PixelLatents()
    images = torch.randint(0, 256, (2, 3, 5, 7)) / 255
    mean, std = latent_space.encode_moments(images)
    decoded = latent_space.decode(latent_space.sample(mean, std, torch.randn_like(mean)))
    assert torch.equal((decoded * 255).round(), (images * 255).round())


def test_decode_clamps():
    assert PixelLatents().decode(torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1)).flatten().tolist() == [0, 0.5, 1]


def test_pixels_are_a_latent_space_by_name():
    latent_space = load_latent_space("pixels")
    assert isinstance(latent_space, PixelLatents)
    assert latent_space.encoder_id == "pixels"
    assert latent_space.latent_shape(5, 7) == (3, 5, 7)
    assert latent_space.to("cpu") is latent_space


def test_empty_images_have_no_latent():
    with pytest.raises(ValueError, match="0 x 7"):
        PixelLatents().latent_shape(0, 7)


def test_scaling_pair():
    latent_space = PixelLatents()
    latent_space.scaling_factor, latent_space.shift_factor = 0.25, 0.5
    mean = torch.full((1, 3, 1, 1), 1.5)
    assert latent_space.sample(mean, torch.zeros_like(mean), mean)[0, 0].item() == 0.25
    # -0.125 / 0.25 + 0.5 = 0, which is the middle of [0, 1].
    assert latent_space.decode(torch.full((1, 3, 1, 1), -0.125))[0, 0].item() == 0.5
