import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_srepa.data.datasets import load_image_dataset
from diffusers_srepa.data.fingerprint import same_images
from diffusers_srepa.data.images import CropGeometry, center_crop_adm, crop_geometry, to_rgb, training_crop
from diffusers_srepa.errors import ConfigurationError, DataError
from tests.helpers.tiny_images import image_table, picture


@pytest.mark.parametrize(
    ("width", "height", "side", "expected"),
    [
        (500, 375, 256, CropGeometry(0, (341, 256), (42, 0))),
        (1024, 1025, 256, CropGeometry(2, (256, 256), (0, 0))),
        (513, 1030, 256, CropGeometry(1, (256, 515), (0, 129))),
        (511, 512, 256, CropGeometry(0, (256, 257), (0, 0))),
        (100, 50, 256, CropGeometry(0, (512, 256), (128, 0))),
        # 6 * 3 / 4 = 4.5 and 10 * 3 / 4 = 7.5: Python rounds halves to the even neighbour.
        (6, 4, 3, CropGeometry(0, (4, 3), (0, 0))),
        (10, 4, 3, CropGeometry(0, (8, 3), (2, 0))),
    ],
)
def test_geometry_of_the_adm_crop(width, height, side, expected):
    assert crop_geometry(width, height, side) == expected


def test_an_image_of_the_right_height_is_only_cut():
    image = picture(0, (300, 256))
    crop = center_crop_adm(image, 256)
    assert np.array_equal(np.array(crop), np.array(image)[:, 22:278])


def test_halving_averages_boxes():
    pixels = np.array([[10, 20, 0, 0], [30, 40, 0, 0], [100, 100, 255, 255], [100, 100, 255, 255]], dtype=np.uint8)
    crop = center_crop_adm(Image.fromarray(pixels), 2)
    assert np.array(crop).tolist() == [[25, 0], [100, 255]]


def test_the_last_resize_is_bicubic():
    image = picture(0, (48, 40))
    expected = image.resize((38, 32), Image.Resampling.BICUBIC).crop((3, 0, 35, 32))
    assert np.array_equal(np.array(center_crop_adm(image, 32)), np.array(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (700, 3)])
def test_extreme_sizes_give_a_crop(size):
    assert training_crop(picture(0, size), 8).shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1", "I;16", "I", "HSV"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (8, 8))
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert training_crop(image, 8).dtype == torch.uint8


def test_greyscale_is_repeated_over_the_channels():
    image = picture(0, (8, 8), mode="L")
    crop = training_crop(image, 8)
    for channel in crop:
        assert np.array_equal(channel.numpy(), np.array(image))


def transparent(mode):
    """A picture whose pixel (0, 0) is transparent and hides a dark colour, and whose (1, 0) is opaque (40, 40, 40)."""
    image = Image.new({"P": "P", "RGB": "RGB", "L": "L"}.get(mode, mode), (4, 4))
    shown, hidden = {"RGBA": ((40, 40, 40, 255), (9, 9, 9, 0)), "LA": ((40, 255), (9, 0))}.get(mode, (40, 9))
    if mode == "RGB":
        shown, hidden = (40, 40, 40), (9, 9, 9)
    if mode == "P":
        image.putpalette([value for level in range(64) for value in [level] * 3])
    image.putpixel((0, 0), hidden)
    image.putpixel((1, 0), shown)
    if mode in ("P", "L", "RGB"):
        image.info["transparency"] = hidden
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_pixels_do_not_show_their_hidden_colour(mode):
    flat = to_rgb(transparent(mode))
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 40, 40)]
    assert to_rgb(transparent(mode), (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


def test_half_transparent_pixels_are_blended():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 51))
    assert to_rgb(image, (100, 100, 100)).getpixel((0, 0)) == (120, 100, 90)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_colour_behind_is_an_option_and_part_of_the_fingerprint(streaming):
    buffer = io.BytesIO()
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(buffer, "PNG")
    table = image_table([buffer.getvalue()] * 2, [0, 0])
    source = table.to_iterable_dataset() if streaming else table

    def load(**options):
        return load_image_dataset(source, resolution=16, **options)

    plain = load()
    for color, expected in {"white": [255] * 3, "#ffffff": [255] * 3, "#0a0b0c": [10, 11, 12]}.items():
        dataset = load(transparent_color=color)
        assert next(iter(dataset))["pixel_values"][:, 0, 0].tolist() == expected
        assert (dataset.fingerprint == plain.fingerprint) == (expected == [255] * 3)
        assert same_images(dataset.fingerprint, plain.fingerprint) == (expected == [255] * 3)
    for color in ("invisible", "#00000000", ""):
        with pytest.raises(ConfigurationError, match="`transparent_color` is .* such as white or #808080"):
            load(transparent_color=color)


def test_palette_colours_are_looked_up():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = b"\x00\xff"
    assert to_rgb(image).getpixel((0, 0)) == (10, 20, 30)


def test_sixteen_bits_are_scaled_to_eight():
    levels = np.array([[0, 257 * 100, 65535], [128, 129, 257]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    decoded = Image.open(buffer)
    assert decoded.mode in ("I;16", "I")
    assert np.array(to_rgb(decoded))[..., 0].tolist() == [[0, 100, 255], [0, 1, 1]]


def test_floating_point_pixels_are_refused():
    with pytest.raises(DataError, match="mode F"):
        to_rgb(Image.new("F", (4, 4)))


def test_tensor_is_channels_first():
    image = Image.new("RGB", (2, 2))
    image.putpixel((1, 0), (1, 2, 3))
    assert training_crop(image, 2)[:, 0, 1].tolist() == [1, 2, 3]
