"""Opening a dataset by name: from the Hub, a folder of images or tables, a file, or what `save_to_disk` wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from diffusers_srepa.data.faults import one_line
from diffusers_srepa.errors import ConfigurationError


#: Loader of the datasets library for a single file, by its ending.
FILE_LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}
#: Pieces of a local dataset that is read as a stream; enough to be dealt to many processes.
LOCAL_STREAM_SHARDS = 64

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]


def open_source(
    name_or_path: str | Path,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Dataset | IterableDataset:
    """Open one split of a dataset.

    Args:
        name_or_path (`str`): repository on the Hub, local folder, or local file (parquet, arrow, tar, zip).
        name (`str`, *optional*): configuration of the dataset.
        split (`str`): split, also a slice such as `"train[:1000]"` where the dataset is not a stream.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        data_dir (`str`, *optional*): folder inside the repository.
        data_files (*optional*): files inside the repository.
        streaming (`bool`): read the rows in order instead of downloading everything first.
        cache_dir (`str`, *optional*): folder for downloads and prepared files.
        token (`str` or `bool`, *optional*): Hub token; by default the stored one.

    Raises:
        ConfigurationError: nothing can be opened under that name, or it has no such split or configuration.
    """
    path = Path(name_or_path).expanduser()
    kwargs: dict[str, Any] = {"name": name, "split": split, "cache_dir": cache_dir, "streaming": streaming}
    if _is_saved_to_disk(path):
        return _open_saved(path, split, streaming)
    if path.is_file():
        loader = FILE_LOADERS.get(path.suffix.lower())
        if loader is None:
            raise ConfigurationError(
                f"the file {path} cannot be read as a dataset, which must be a folder, a Hub id, or a file ending in "
                f"{', '.join(FILE_LOADERS)} (option data.dataset)."
            )
        return _load(name_or_path, loader, data_files=str(path), **kwargs)
    if path.is_dir():
        return _load(name_or_path, str(path), data_dir=data_dir, data_files=data_files, **kwargs)
    if _looks_like_a_path(str(name_or_path)):
        raise ConfigurationError(f"the dataset {name_or_path} does not exist (option data.dataset).")
    kwargs |= {"revision": revision, "token": token, "data_dir": data_dir, "data_files": data_files}
    return _load(name_or_path, str(name_or_path), **kwargs)


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
            f"the dataset {asked_for}{configuration}, split {split} cannot be opened ({reason}): change data.dataset, "
            "data.name or data.split."
        ) from error


def _check_split(asked_for: str | Path, builder: datasets.DatasetBuilder, split: str) -> None:
    known = [str(found) for found in builder.info.splits or builder.config.data_files or ()]
    wanted = re.match(r"[\w.-]+", split)
    if known and (wanted is None or wanted.group() not in [*known, "all"]):
        raise ConfigurationError(
            f"the dataset {asked_for} has no split {split!r}, its splits are {', '.join(map(repr, known))} "
            "(option data.split)."
        )


def _is_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def _open_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ConfigurationError(
            f"the dataset saved in {path} cannot be opened ({one_line(error)}): change data.dataset."
        ) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ConfigurationError(
                f"the dataset saved in {path} has no split {split!r}, its splits are "
                f"{', '.join(repr(str(found)) for found in saved)} (option data.split)."
            )
        saved = saved[split]
    if streaming:
        return saved.to_iterable_dataset(num_shards=max(1, min(LOCAL_STREAM_SHARDS, len(saved))))
    return saved


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
