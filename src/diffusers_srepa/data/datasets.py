"""Any dataset of images, opened for training: from the Hub or a folder, map style or as a stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from diffusers_srepa.data.columns import find_image_column, find_label_column
from diffusers_srepa.data.image_dataset import ImageDataset, OnBadImage
from diffusers_srepa.data.latent_store import LatentCache
from diffusers_srepa.data.source import DataFiles, open_source
from diffusers_srepa.data.streaming import StreamingImages
from diffusers_srepa.errors import ConfigurationError


logger = logging.getLogger(__name__)


def load_image_dataset(
    name_or_path: str | Path | Dataset | IterableDataset,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int,
    horizontal_flip: bool = False,
    on_bad_image: OnBadImage = "skip",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    latent_cache: str | Path | LatentCache | None = None,
    codec_id: str | None = None,
    need_pixels: bool = True,
) -> ImageDataset | StreamingImages:
    """Open a dataset of images for training.

    Args:
        name_or_path: repository on the Hub, local folder or file (see `open_source`), or an object of the datasets
            library.
        name, split, revision, data_dir, data_files, streaming, cache_dir, token: see `open_source`.
        image_column (`str`, *optional*): column of the images, by default found by its type.
        label_column (`str`, *optional*): column of the classes, by default found by type and name; without one the
            dataset has a single class.
        resolution (`int`): side S of the training crops.
        horizontal_flip (`bool`): flip half of the samples.
        on_bad_image (`str`): `"skip"` puts the next readable row in the place of an unreadable one and counts it,
            `"raise"` stops.
        seed (`int`): seed of order and flips.
        latent_cache (`str` or `LatentCache`, *optional*): what `cache_latents` wrote for this dataset.
        codec_id (`str`, *optional*): the codec that the cache must come from.
        need_pixels (`bool`): whether items hold the crop also when there is a latent cache.

    Returns:
        `ImageDataset`, or `StreamingImages` for a stream.

    Raises:
        ConfigurationError: the dataset, a column or the cache does not exist or does not fit.
        DataError: rows without labels, or no rows.
    """
    _check_options(resolution, on_bad_image)
    source: Dataset | IterableDataset
    if isinstance(name_or_path, Dataset | IterableDataset):
        source, described = name_or_path, type(name_or_path).__name__
    else:
        described = str(name_or_path)
        source = open_source(
            name_or_path,
            name=name,
            split=split,
            revision=revision,
            data_dir=data_dir,
            data_files=data_files,
            streaming=streaming,
            cache_dir=cache_dir,
            token=token,
        )
    options: dict[str, Any] = {"resolution": resolution, "seed": seed, "horizontal_flip": horizontal_flip}
    options |= {"on_bad_image": on_bad_image}
    if isinstance(source, IterableDataset):
        return _open_stream(source, described, image_column, label_column, latent_cache, options)
    options |= _columns(described, source.features, image_column, label_column)
    return ImageDataset(source, latent_cache=_cache(latent_cache, codec_id), need_pixels=need_pixels, **options)


def _check_options(resolution: int, on_bad_image: str) -> None:
    if resolution < 1:
        raise ConfigurationError(f"data.resolution is {resolution}, but must be at least 1.")
    if on_bad_image not in ("skip", "raise"):
        raise ConfigurationError(f"data.on_bad_image is {on_bad_image!r}, but must be 'skip' or 'raise'.")


def _cache(latent_cache: str | Path | LatentCache | None, codec_id: str | None) -> LatentCache | None:
    if latent_cache is None:
        return None
    cache = latent_cache if isinstance(latent_cache, LatentCache) else LatentCache.open(latent_cache)
    cache.check(codec_id=codec_id)
    return cache


def _columns(
    described: str, features: Mapping[str, Any], image_column: str | None, label_column: str | None
) -> dict[str, str | None]:
    labels = find_label_column(features, label_column)
    if labels is None:
        logger.warning(f"the dataset {described} has no column of labels: all images are of one class, 0.")
    return {"image_column": find_image_column(features, image_column), "label_column": labels}


def _open_stream(
    source: IterableDataset,
    described: str,
    image_column: str | None,
    label_column: str | None,
    latent_cache: Any,
    options: dict[str, Any],
) -> StreamingImages:
    if latent_cache is not None:
        raise ConfigurationError(
            "a latent cache finds latents by row number, which a stream does not have: unset data.streaming or "
            "data.latent_cache."
        )
    source = source if source.features is not None else source._resolve_features()
    options |= _columns(described, source.features or {}, image_column, label_column)
    return StreamingImages(source, name=described, **options)
