"""From an encoded image of a dataset to the training crop: decoding, RGB, ADM's centre crop, uint8.

The crop is the "center-crop-dhariwal" preprocessing of ADM, EDM and REPA, in Pillow throughout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from PIL import Image, ImageColor

from diffusers_srepa.data.read_errors import is_outage
from diffusers_srepa.errors import ConfigurationError, DataError, one_line


#: Name of the crop in the files that hold crops or their latents; another rule would get another name.
CROP_RULE = "adm-center-crop"

Color: TypeAlias = tuple[int, int, int]
WHITE: Color = (255, 255, 255)

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# The library's own decoder: Pillow, EXIF rotation applied, files and remote paths opened where bytes are not stored.
_DECODER = datasets.Image()


def read_crop(
    cell: dict[str, Any] | None, size: int, tokens: Mapping[str, Any] | None = None, background: Color = WHITE
) -> torch.Tensor:
    """The training crop of an image as it is stored in a dataset.

    Args:
        cell: `{"bytes": ..., "path": ...}`, as an Image column with `decode=False` gives it.
        size (`int`): side of the crop.
        tokens (`Mapping`, *optional*): Hub tokens by repository, for paths on the Hub.
        background (`tuple[int, int, int]`): what transparent pixels lie on.

    Returns:
        `torch.Tensor`: uint8, shape `(3, size, size)`.

    Raises:
        DataError: there is no image, or its file cannot be decoded; the sentence begins with "it".
        ConnectionError: network, server or machine failed, which says nothing about the image.
        MemoryError: there is too little memory to decode it.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise DataError("it holds no image.")
    try:
        return training_crop(_DECODER.decode_example(cell, token_per_repo_id=dict(tokens or {})), size, background)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds of exceptions for broken files.
        file = f" (file {cell['path']})" if cell["path"] else ""
        # Pillow names the buffer it read from by its address, which tells nobody anything.
        reason = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "its bytes", one_line(error))
        if is_outage(error):
            raise ConnectionError(f"{reason}{file}") from error
        raise DataError(f"it cannot be decoded{file}: {reason}.") from error


@dataclass(frozen=True)
class CropGeometry:
    """What ADM's centre crop does to an image of a given size; sizes are (width, height).

    Args:
        halvings (`int`): how often width and height are halved, rounding down, by averaging boxes.
        size (`tuple[int, int]`): size after the bicubic resize; its smaller side is the crop's side.
        offset (`tuple[int, int]`): left and upper corner of the crop.
    """

    halvings: int
    size: tuple[int, int]
    offset: tuple[int, int]


def crop_geometry(width: int, height: int, side: int) -> CropGeometry:
    """The steps from an image of `width` x `height` to a crop of `side` x `side`."""
    halvings = 0
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        halvings += 1
    scale = side / min(width, height)
    size = (round(width * scale), round(height * scale))
    return CropGeometry(halvings, size, ((size[0] - side) // 2, (size[1] - side) // 2))


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by boxes while possible, resize bicubically, cut the middle.

    Args:
        image (`PIL.Image.Image`): any size of at least 1 x 1; smaller images are enlarged.
        size (`int`): side of the crop in pixels.

    Returns:
        `PIL.Image.Image`: `size` x `size`, in the mode of `image`.

    Raises:
        DataError: it is so much longer than wide that resizing it would take more pixels than Pillow agrees to open.
    """
    geometry = crop_geometry(image.width, image.height, size)
    # Pillow guards what a file unpacks to. A strip of one pixel's width passes, and grows by the square of the size.
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and geometry.size[0] * geometry.size[1] > 2 * most:
        raise DataError(
            f"it has {image.width} x {image.height} pixels, a strip that would be {geometry.size[0]} x "
            f"{geometry.size[1]} pixels at a resolution of {size}."
        )
    for _ in range(geometry.halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(geometry.size, Image.Resampling.BICUBIC)
    left, upper = geometry.offset
    return image.crop((left, upper, left + size, upper + size))


def parse_color(color: str) -> Color:
    """Red, green and blue, 0 to 255, of `"#rrggbb"` or of a name that Pillow knows.

    Raises:
        ConfigurationError: it is neither; the sentence names `transparent_color`.
    """
    try:
        found: tuple[int, ...] = ImageColor.getrgb(color)
    except ValueError:
        found = ()
    if len(found) != 3:
        raise ConfigurationError(
            f"`transparent_color` is {color!r}, but must be a colour without transparency, such as white or #808080."
        )
    return found[0], found[1], found[2]


def to_rgb(image: Image.Image, background: Color = WHITE) -> Image.Image:
    """An 8-bit RGB image of a picture in any mode.

    Transparent pixels are blended with `background`, because their own colour is arbitrary. Greyscale of 16 bits is
    scaled to 8, because Pillow's own conversion would clip it. Floating point, whose range nobody knows, is a
    DataError.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise DataError("its pixels are floating point (mode F): save it with 8 or 16 bits per channel.")
    if image.mode in _SIXTEEN_BIT_MODES:
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, background)
        flat.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return flat
    return image.convert("RGB")


def training_crop(image: Image.Image, size: int, background: Color = WHITE) -> torch.Tensor:
    """The whole way from a picture to the uint8 training crop `(3, size, size)`."""
    crop = center_crop_adm(to_rgb(image, background), size)
    return torch.from_numpy(np.array(crop, dtype=np.uint8)).permute(2, 0, 1).contiguous()
