"""Any dataset of images, opened for training: of the Hub, a folder or a file, map style or as a stream."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from diffusers_srepa.data.columns import find_image_column, find_label_column
from diffusers_srepa.data.image_dataset import ImageDataset, OnBadImage
from diffusers_srepa.data.images import parse_color
from diffusers_srepa.data.latent_cache.read import LatentCache
from diffusers_srepa.data.streaming import StreamingImages
from diffusers_srepa.errors import ConfigurationError, one_line


logger = logging.getLogger(__name__)

#: Loader of the datasets library for a single file, by its ending.
FILE_LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}
#: Pieces of a local dataset that is read as a stream; enough to be dealt to many processes.
LOCAL_STREAM_SHARDS = 64


def load_image_dataset(
    name_or_path: str | Path | Dataset | IterableDataset,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_dir: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int,
    horizontal_flip: bool = False,
    on_bad_image: OnBadImage = "skip",
    transparent_color: str = "white",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    latent_cache: str | Path | LatentCache | None = None,
    encoder_id: str | None = None,
    need_pixels: bool = True,
) -> ImageDataset | StreamingImages:
    """Open a dataset of images for training.

    Args:
        name_or_path: repository on the Hub, local folder (of images, of tables, or written by `save_to_disk`), local
            file (parquet, arrow, tar, zip), or an object of the datasets library.
        name (`str`, *optional*): configuration of the dataset.
        split (`str`): split, also a slice such as `"train[:1000]"` where the dataset is not a stream.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        data_dir (`str`, *optional*): folder inside the repository.
        streaming (`bool`): read the rows in order instead of downloading everything first.
        image_column (`str`, *optional*): column of the images, by default found by its type.
        label_column (`str`, *optional*): column of the classes, by default found by type and name; without one the
            dataset has a single class.
        resolution (`int`): side S of the training crops.
        horizontal_flip (`bool`): flip half of the samples.
        on_bad_image (`str`): `"skip"` puts the next readable row in the place of an unreadable one and counts it,
            `"raise"` stops.
        transparent_color (`str`): what transparent pixels lie on, `"#rrggbb"` or a name that Pillow knows.
        seed (`int`): seed of order and flips.
        cache_dir (`str`, *optional*): folder for downloads and prepared files.
        token (`str` or `bool`, *optional*): Hub token; by default the stored one.
        latent_cache (`str` or `LatentCache`, *optional*): what `cache_latents` wrote for this dataset.
        encoder_id (`str`, *optional*): the encoder that the cache must come from, see `LatentSpace`.
        need_pixels (`bool`): whether items hold the crop also when there is a latent cache.

    Returns:
        `ImageDataset`, or `StreamingImages` for a stream.

    Raises:
        ConfigurationError: the dataset, a split, a column or the cache does not exist or does not fit.
        DataError: rows without labels, or no rows.
    """
    if resolution < 1:
        raise ConfigurationError(f"`resolution` is {resolution}, but must be at least 1.")
    if on_bad_image not in ("skip", "raise"):
        raise ConfigurationError(f"`on_bad_image` is {on_bad_image!r}, but must be 'skip' or 'raise'.")
    background = parse_color(transparent_color)
    source: Dataset | IterableDataset
    if isinstance(name_or_path, Dataset | IterableDataset):
        source, described = name_or_path, type(name_or_path).__name__
    else:
        described = str(name_or_path)
        kwargs = {"name": name, "split": split, "cache_dir": cache_dir, "streaming": streaming}
        source = _open_source(name_or_path, data_dir, {"revision": revision, "token": token}, **kwargs)
    if isinstance(source, IterableDataset):
        if latent_cache is not None:
            raise ConfigurationError(
                "a latent cache finds latents by row number, which a stream does not have: unset `streaming` or "
                "`latent_cache`."
            )
        source = source if source.features is not None else source._resolve_features()
    found_label_column = find_label_column(source.features or {}, label_column)
    if found_label_column is None:
        logger.warning(f"the dataset {described} has no column of labels: all images are of one class, 0.")
    options: dict[str, Any] = {
        "image_column": find_image_column(source.features or {}, image_column),
        "label_column": found_label_column,
        "resolution": resolution,
        "seed": seed,
        "horizontal_flip": horizontal_flip,
        "on_bad_image": on_bad_image,
        "background": background,
    }
    if isinstance(source, IterableDataset):
        return StreamingImages(source, name=described, **options)
    if latent_cache is not None:
        latent_cache = latent_cache if isinstance(latent_cache, LatentCache) else LatentCache.open(latent_cache)
        latent_cache.check(encoder_id=encoder_id)
    return ImageDataset(source, latent_cache=latent_cache, need_pixels=need_pixels, **options)


def _open_source(
    name_or_path: str | Path, data_dir: str | None, remote: dict[str, Any], **kwargs: Any
) -> Dataset | IterableDataset:
    """One split of a dataset by name; `data_dir` is inside a folder or repository, `remote` is for the Hub alone."""
    path = Path(name_or_path).expanduser()
    is_saved_table = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    if is_saved_table or (path / "dataset_dict.json").is_file():
        return _open_saved(path, kwargs["split"], kwargs["streaming"])
    if path.is_file():
        loader = FILE_LOADERS.get(path.suffix.lower())
        if loader is None:
            raise ConfigurationError(
                f"the file {path} cannot be read as a dataset, which must be a folder, a Hub id, or a file ending in "
                f"{', '.join(FILE_LOADERS)} (option `name_or_path`)."
            )
        return _load(name_or_path, loader, data_files=str(path), **kwargs)
    if path.is_dir():
        return _load(name_or_path, str(path), data_dir=data_dir, **kwargs)
    text = str(name_or_path)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise ConfigurationError(f"the dataset {name_or_path} does not exist (option `name_or_path`).")
    return _load(name_or_path, text, data_dir=data_dir, **remote, **kwargs)


def _load(
    asked_for: str | Path, loader: str, *, split: str, streaming: bool, **kwargs: Any
) -> Dataset | IterableDataset:
    # The steps of `datasets.load_dataset`, with a look at the splits before anything is downloaded.
    try:
        builder = datasets.load_dataset_builder(loader, **kwargs)
        _check_split(asked_for, builder, split)
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except ConfigurationError:
        raise
    except Exception as error:  # The loaders of the library raise whatever their file formats and transports raise.
        configuration = f", configuration {kwargs['name']}" if kwargs["name"] else ""
        reason = one_line(error.__cause__ or error)
        raise ConfigurationError(
            f"the dataset {asked_for}{configuration}, split {split} cannot be opened ({reason}): change "
            "`name_or_path`, `name` or `split`."
        ) from error


def _check_split(asked_for: str | Path, builder: datasets.DatasetBuilder, split: str) -> None:
    known = [str(found) for found in builder.info.splits or builder.config.data_files or ()]
    wanted = re.match(r"[\w.-]+", split)
    if known and (wanted is None or wanted.group() not in [*known, "all"]):
        raise _no_split(str(asked_for), split, known)


def _no_split(described: str, split: str, known: Iterable[object]) -> ConfigurationError:
    splits = ", ".join(repr(str(found)) for found in known)
    return ConfigurationError(
        f"the dataset {described} has no split {split!r}, its splits are {splits} (option `split`)."
    )


def _open_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ConfigurationError(
            f"the dataset saved in {path} cannot be opened ({one_line(error)}): change `name_or_path`."
        ) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise _no_split(f"saved in {path}", split, saved)
        saved = saved[split]
    if streaming:
        return saved.to_iterable_dataset(num_shards=max(1, min(LOCAL_STREAM_SHARDS, len(saved))))
    return saved
