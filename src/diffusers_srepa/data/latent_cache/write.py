"""Writing the latents of a dataset once, so that training does not have to encode images.

The work is cut into shards. A shard is written under a temporary name, made durable and renamed, then marked as done,
so that a killed run repeats at most the shard it was at. Processes write shards of their own; whichever finds all of
them done writes the one file that makes the folder a cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffusers_srepa.data.batches import read_batches
from diffusers_srepa.data.image_dataset import ImageDataset
from diffusers_srepa.data.latent_cache.layout import (
    INCOMPLETE_LAYOUT_FILE,
    LAYOUT_FILE,
    CacheLayout,
    done_file,
    shard_file,
)
from diffusers_srepa.data.latent_cache.read import LatentCache
from diffusers_srepa.data.latent_cache.verify import damaged_shards
from diffusers_srepa.errors import ConfigurationError, DataError
from diffusers_srepa.files import (
    LOCK_FILE,
    TEMPORARY_PREFIX,
    FolderLock,
    check_output_place,
    sha256,
    write_text,
    written_file,
)
from diffusers_srepa.latents.latent_space import LatentSpace


logger = logging.getLogger(__name__)

_AGAIN = "run the same command again, which keeps the finished shards"


def cache_latents(
    dataset: ImageDataset,
    latent_space: LatentSpace,
    output_dir: str | Path,
    *,
    flip: bool = False,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 32,
    shard_rows: int = 4096,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> LatentCache | None:
    """Encode every image of `dataset` and store mean and standard deviation of its latent.

    Called again after an interruption, also with another number of processes, it goes on where it was; called on a
    finished cache of the same content, it returns that, after the first process has written damaged shards again.

    Args:
        dataset (`ImageDataset`): the images, with their resolution and crop.
        latent_space (`LatentSpace`): moved to `device`.
        output_dir (`str`): where the cache is written.
        flip (`bool`): store the latents of the mirrored crops too, which doubles the size.
        dtype (`str`): precision of the stored numbers.
        batch_size (`int`): images encoded at once.
        shard_rows (`int`): rows per file.
        process_index (`int`), num_processes (`int`): this process, and how many of them share the work.
        num_workers (`int`): loader processes.
        device: where the autoencoder runs.
        show_progress (`bool`): whether this process shows a progress bar.

    Returns:
        The cache, or None while shards of other processes are missing, and where a finished cache is the first
        process's business alone; rows whose image cannot be read are recorded in it.

    Raises:
        ConfigurationError: the folder holds another cache or something else, or is being written to, the disk is too
            small, or a number is out of range.
        DataError: no image can be read, an image cannot be read where the dataset's `on_bad_image` is `"raise"`,
            latents do not fit into `dtype`, or writing fails; what is finished stays.
    """
    _check_arguments(dtype, batch_size, shard_rows, process_index, num_processes)
    folder = Path(output_dir)
    channels, height, width = latent_space.to(device).latent_shape(dataset.resolution, dataset.resolution)
    layout = CacheLayout(
        rows=len(dataset),
        shape=(2 * channels, height, width),
        dtype=dtype,
        flip=flip,
        resolution=dataset.resolution,
        encoder_id=latent_space.encoder_id,
        fingerprint=dataset.fingerprint,
        shard_rows=shard_rows,
    )
    # One per process of a launch: two launches have a first process each.
    name = f"{LOCK_FILE}.{process_index}" if process_index else LOCK_FILE
    lock = FolderLock(folder, "cache-latents", name)
    try:
        check_cache_folder(folder)
        lock.acquire()
        state = _join(folder, layout)
        if state is not None and process_index > 0:
            return None
        if state == "finished" and not _reopen(folder):
            return LatentCache.open(folder)
        missing = [shard for shard in range(layout.num_shards) if not done_file(folder, shard).is_file()]
        _check_space(folder, layout, missing)
        mine = [shard for shard in missing if state is not None or shard % num_processes == process_index]
        total = sum(len(layout.rows_of(shard)) for shard in mine)
        batches = _batches(dataset, layout, mine, batch_size, num_workers)
        with closing(batches), tqdm(total=total, desc="latents", unit="img", disable=not show_progress) as progress:
            for shard in mine:
                unreadable: list[int] = []
                digest = hashlib.sha256()
                with written_file(shard_file(folder, shard)) as temporary, temporary.open("wb") as file:
                    for rows, crops, readable in islice(batches, -(-len(layout.rows_of(shard)) // batch_size)):
                        content = _encode(latent_space, crops.to(device), layout).tobytes()
                        file.write(content)
                        digest.update(content)
                        unreadable += rows[~readable].tolist()
                        progress.update(len(rows))
                _write_json(done_file(folder, shard), {"unreadable": unreadable, "sha256": digest.hexdigest()})
        return _finish(folder, layout)
    except OSError as error:
        raise DataError(
            f"the latent cache in {folder} could not be written ({error.strerror or error}): free space or change "
            f"`output_dir`, then {_AGAIN}."
        ) from error
    finally:
        lock.release()


class _Crops(Dataset):
    """Crops by row number, with a zero image and False in the place of an unreadable one."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor, bool]:
        try:
            return row, self.dataset.read_pixels(row), True
        except DataError as error:
            if self.dataset.on_bad_image == "raise":
                raise
            logger.warning(f"{error} Training will put the next readable row in its place.")
            return row, torch.zeros(3, self.dataset.resolution, self.dataset.resolution, dtype=torch.uint8), False


def _batches(
    dataset: ImageDataset, layout: CacheLayout, shards: list[int], batch_size: int, num_workers: int
) -> Generator[tuple[torch.Tensor, torch.Tensor, torch.Tensor], None, None]:
    """Row numbers in order, their crops (B, 3, S, S) and which are readable; no batch crosses two shards."""
    batches = []
    for shard in shards:
        rows = list(layout.rows_of(shard))
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return read_batches(DataLoader(_Crops(dataset), batch_sampler=batches, num_workers=num_workers), _AGAIN)


def _encode(latent_space: LatentSpace, crops: torch.Tensor, layout: CacheLayout) -> np.ndarray:
    """Moments of uint8 crops in the cache's dtype, shape (B, copies, 2C, h, w)."""
    images = crops.float() / 255
    copies = [images, images.flip(-1)] if layout.flip else [images]
    moments = torch.stack([torch.cat(latent_space.encode_moments(copy), dim=1) for copy in copies], dim=1)
    moments = moments.to(getattr(torch, layout.dtype)).cpu()
    if not torch.isfinite(moments).all():
        raise DataError(f"the latents have values that {layout.dtype} cannot hold: set `dtype` to float32.")
    return moments.numpy()


def check_cache_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a cache, finished or not.

    Raises:
        ConfigurationError: it is not empty and none of a cache, or the root of a file system or the home folder.
    """
    check_output_place(folder)
    if (folder / LAYOUT_FILE).exists() or (folder / INCOMPLETE_LAYOUT_FILE).exists() or not folder.is_dir():
        return
    # Another process of this launch may have just begun or finished the cache.
    own = rf"shard_\d+\.(bin|json)|latents\..*|({re.escape(LOCK_FILE)}|{re.escape(TEMPORARY_PREFIX)}).*"
    others = [path.name for path in folder.iterdir() if not re.fullmatch(own, path.name)]
    if others:
        raise ConfigurationError(
            f"the folder {folder} is not empty ({min(others)}) and holds no latent cache: change `output_dir`."
        )


def _join(folder: Path, layout: CacheLayout) -> Literal["finished", "reopened"] | None:
    """Make `folder` the place of this cache; whether it is finished already, or was and has lost shards."""
    for file in (folder / LAYOUT_FILE, folder / INCOMPLETE_LAYOUT_FILE):
        try:
            content = json.loads(file.read_text())
            found = CacheLayout.from_json(content)
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{file} is damaged: remove it or change `output_dir`.") from error
        differences = [
            f"{name} {getattr(found, name)}, not {value}"
            for name, value in vars(layout).items()
            if getattr(found, name) != value
        ]
        if differences:
            raise ConfigurationError(
                f"{folder} holds a latent cache of something else ({'; '.join(differences)}): change `output_dir`."
            )
        if file.name == LAYOUT_FILE:
            return "finished"
        return "reopened" if content.get("reopened") else None
    _write_json(folder / INCOMPLETE_LAYOUT_FILE, layout.to_json())
    return None


def _reopen(folder: Path) -> bool:
    """Make an unfinished cache of a finished one with damaged shards, which are then missing; False if it has none."""
    cache = LatentCache.open_unchecked(folder)
    damaged = damaged_shards(folder, cache.layout, cache.checksums)
    if not damaged:
        return False
    logger.warning(f"{len(damaged)} shards are written again: {'; '.join(damaged.values())}.")
    # In this order, so that a process that is killed meanwhile leaves either a damaged cache or an unfinished one. The
    # mark keeps processes that come to it at different times from sharing the work otherwise than they began.
    _write_json(folder / INCOMPLETE_LAYOUT_FILE, cache.layout.to_json() | {"reopened": True})
    for shard in damaged:
        done_file(folder, shard).unlink(missing_ok=True)
        shard_file(folder, shard).unlink(missing_ok=True)
    (folder / LAYOUT_FILE).unlink()
    return True


def _finish(folder: Path, layout: CacheLayout) -> LatentCache | None:
    """Write the layout file if every shard is done."""
    done = [done_file(folder, shard) for shard in range(layout.num_shards)]
    if not all(file.is_file() for file in done):
        return None
    records = [json.loads(file.read_text()) for file in done]
    unreadable = [row for record in records for row in record["unreadable"]]
    if len(unreadable) == layout.rows:
        raise DataError("not one image of the dataset can be read: see the warnings above (option `name_or_path`).")
    if unreadable:
        logger.warning(f"{len(unreadable)} of {layout.rows} images could not be read and were recorded in the cache.")
    # Shards of earlier versions of this package were marked as done without a checksum.
    checksums = [record.get("sha256") or sha256(shard_file(folder, shard)) for shard, record in enumerate(records)]
    _write_json(folder / LAYOUT_FILE, layout.to_json() | {"unreadable": unreadable, "sha256": checksums})
    (folder / INCOMPLETE_LAYOUT_FILE).unlink(missing_ok=True)
    # Of shards only, because another process may be writing the layout file at this moment.
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}shard_*"):
        leftover.unlink(missing_ok=True)
    return LatentCache.open(folder)


def _check_arguments(dtype: str, batch_size: int, shard_rows: int, process_index: int, num_processes: int) -> None:
    if dtype not in ("float16", "float32"):
        raise ConfigurationError(f"`dtype` is {dtype!r}, but must be 'float16' or 'float32'.")
    for name, value in {"batch_size": batch_size, "shard_rows": shard_rows, "num_processes": num_processes}.items():
        if value < 1:
            raise ConfigurationError(f"`{name}` is {value}, but must be at least 1.")
    if not 0 <= process_index < num_processes:
        raise ConfigurationError(f"`process_index` is {process_index}, but must lie in [0, {num_processes}).")


def _check_space(folder: Path, layout: CacheLayout, missing: list[int]) -> None:
    needed = sum(len(layout.rows_of(shard)) for shard in missing) * layout.bytes_per_row
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigurationError(
            f"the latent cache takes {needed / 2**30:.1f} GiB more, but {folder} has {free / 2**30:.1f} GiB free: "
            "change `output_dir`, set `dtype` to float16 or unset `flip`."
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1))
