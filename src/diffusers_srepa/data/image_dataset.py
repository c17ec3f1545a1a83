"""A map-style dataset of training crops, latents and class labels."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any, Literal

import torch
from datasets import Dataset as TableDataset
from datasets import Image
from torch.utils.data import Dataset

from diffusers_srepa.data.columns import read_labels
from diffusers_srepa.data.fingerprint import dataset_fingerprint, on_background
from diffusers_srepa.data.images import WHITE, Color, read_crop
from diffusers_srepa.data.latent_cache.read import LatentCache
from diffusers_srepa.data.order import SampleKey, is_flipped
from diffusers_srepa.errors import ConfigurationError, DataError


logger = logging.getLogger(__name__)

#: Rows that are tried in the place of an unreadable one before the dataset is given up.
MAX_REPLACEMENTS = 1_000

OnBadImage = Literal["skip", "raise"]


def pass_over(error: DataError, on_bad_image: OnBadImage, is_known: bool = False) -> None:
    """Warn of a row that another one replaces, unless it `is_known`; or raise, where that is asked for."""
    if on_bad_image == "raise":
        raise DataError(f"{str(error).rstrip('.')}: repair it, or set `on_bad_image` to skip.") from error
    if not is_known:
        logger.warning(f"{error} The next readable row takes its place.")


class ImageDataset(Dataset):
    """Training crops of a map-style dataset; `load_image_dataset` builds it.

    `dataset[SampleKey(index, step, position)]` is a dict of

    - `pixel_values`: uint8 `(3, S, S)`, unless `need_pixels` is off;
    - `moments`: float32 `(2C, h, w)`, mean and standard deviation, with a latent cache;
    - `class_labels`: int64 `()`;
    - `index`: the row that was read; `step`, `position`: as in the key;
    - `replaced`: how many unreadable rows were passed over before `index`.

    Whether a sample is flipped depends on (seed, step, position); crop and moments flip together. A plain integer as
    key means step 0, the position of its own number, and no flip. Items can be read by any number of loader processes.

    Attributes:
        num_classes (`int`): number of classes; 1 without labels.
        id2label (`dict[int, str]`, *optional*): names of the classes.
        image_column (`str`), label_column (`str`, *optional*): the columns in use.
    """

    def __init__(
        self,
        source: TableDataset,
        *,
        image_column: str,
        label_column: str | None,
        resolution: int,
        seed: int,
        horizontal_flip: bool = False,
        on_bad_image: OnBadImage = "skip",
        background: Color = WHITE,
        latent_cache: LatentCache | None = None,
        need_pixels: bool = True,
    ) -> None:
        if len(source) == 0:
            raise DataError("the dataset has no rows: choose another one (option `name_or_path`) or split (`split`).")
        if latent_cache is None and not need_pixels:
            raise ConfigurationError("without pixels the dataset needs a latent cache (option `latent_cache`).")
        self.image_column = image_column
        self.label_column = label_column
        self.resolution = resolution
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self.on_bad_image = on_bad_image
        self.need_pixels = need_pixels
        self.background = background
        labels = read_labels(source, label_column)
        self.labels, self.num_classes, self.id2label = labels.values, labels.num_classes, labels.id2label
        # Undecoded, so that a broken file is met where it can be named, and nothing else is decoded in vain.
        self._images = source.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        self._reported: set[int] = set()
        self.latent_cache = latent_cache
        if latent_cache is not None:
            latent_cache.check(
                rows=len(source), fingerprint=self.fingerprint, resolution=resolution, flip=horizontal_flip
            )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the dataset by its content, see `data/fingerprint.py`; computed on first use."""
        labels = self.labels if self.label_column is not None else None
        return on_background(dataset_fingerprint(self._images, self.image_column, labels), self.background)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        if isinstance(key, SampleKey):
            flipped = self.horizontal_flip and is_flipped(self.seed, key.step, key.position)
        else:
            key, flipped = SampleKey(range(len(self))[key], 0, range(len(self))[key]), False
        attempts = min(len(self), MAX_REPLACEMENTS)
        for replaced in range(attempts):
            row = (key.index + replaced) % len(self)
            try:
                return self._item(row, key, replaced, flipped)
            except DataError as error:
                pass_over(error, self.on_bad_image, is_known=row in self._reported)
                self._reported.add(row)
        raise DataError(
            f"none of the {attempts} rows of the dataset from row {key.index} on can be read, so it is given up: see "
            "the warnings above (option `name_or_path`)."
        )

    def read_pixels(self, row: int) -> torch.Tensor:
        """The training crop of `row`, uint8 `(3, S, S)`, not flipped.

        Raises:
            DataError: the row has no image or one that cannot be decoded; the sentence names the row.
        """
        try:
            return read_crop(self._images[row][self.image_column], self.resolution, background=self.background)
        except DataError as error:
            raise DataError(f"the image of row {row} of the dataset is unreadable, {error}") from error

    def _item(self, row: int, key: SampleKey, replaced: int, flipped: bool) -> dict[str, Any]:
        item: dict[str, Any] = {}
        if self.latent_cache is not None:
            item["moments"] = self.latent_cache.moments(row, flipped=flipped)
        if self.need_pixels:
            pixels = self.read_pixels(row)
            item["pixel_values"] = pixels.flip(-1) if flipped else pixels
        item["class_labels"] = torch.tensor(int(self.labels[row]), dtype=torch.int64)
        return item | {"index": row, "position": key.position, "step": key.step, "replaced": replaced}
