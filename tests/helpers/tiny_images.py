"""Small datasets of real image files, written where a test wants them."""

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage


def picture(number: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> PILImage.Image:
    """A picture of random pixels that depends on its number alone; size is (width, height)."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


def png(number: int, **kwargs) -> bytes:
    buffer = io.BytesIO()
    picture(number, **kwargs).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    picture(number, size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_image_folder(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 4) -> Path:
    """Class folders of PNGs; the pictures are numbered in the order of the rows."""
    number = 0
    for name in sorted(classes):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            (folder / name / f"{index}.png").write_bytes(png(number))
            number += 1
    return folder


def image_table(images: list[bytes | None], labels: list | None = None, label_feature=None) -> Dataset:
    """A dataset of encoded images in memory, with a `label` column if labels are given."""
    columns: dict = {"image": [None if image is None else {"bytes": image, "path": None} for image in images]}
    features = {"image": Image()}
    if labels is not None:
        columns["label"] = labels
        features["label"] = label_feature or Value("int64")
    return Dataset.from_dict(columns, features=Features(features))


def numbered_images(count: int, classes: int = 2) -> Dataset:
    """`count` pictures whose class is their number modulo `classes`."""
    names = ClassLabel(names=[f"class {index}" for index in range(classes)])
    return image_table([png(number) for number in range(count)], [i % classes for i in range(count)], names)
