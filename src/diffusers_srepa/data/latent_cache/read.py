"""Reading a latent cache: moments by row number."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch

from diffusers_srepa.data.fingerprint import same_images
from diffusers_srepa.data.latent_cache.layout import FORMAT_VERSION, LAYOUT_FILE, CacheLayout, shard_file
from diffusers_srepa.data.latent_cache.verify import damaged_shards
from diffusers_srepa.errors import ConfigurationError, DataError, one_line


_WRITE_AGAIN = "write the cache again with diffusers-srepa cache-latents (option `latent_cache`)"
_WRITE_SHARDS = (
    "run the same diffusers-srepa cache-latents command again, which writes such shards anew (option `latent_cache`)"
)


class LatentCache:
    """Moments by row number, read-only; any number of processes and loader workers may read one cache.

    Args:
        folder (`Path`): the cache.
        layout (`CacheLayout`): what it holds.
        unreadable (`frozenset[int]`): rows whose image could not be read when the cache was written.
        checksums (`Sequence[str]`, *optional*): SHA-256 of every shard; caches of earlier versions have none.
    """

    def __init__(
        self,
        folder: Path,
        layout: CacheLayout,
        unreadable: frozenset[int] = frozenset(),
        checksums: Sequence[str] | None = None,
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.unreadable = unreadable
        self.checksums = checksums
        self._shards: dict[int, BinaryIO] = {}

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Self:
        """Open a finished cache, as `cache_latents` writes it.

        Args:
            folder (`str`): the cache.
            verify (`bool`): hash every shard, also those that were found right before, and write nothing.

        Raises:
            ConfigurationError: the cache is missing, unfinished, damaged or of another format.
        """
        cache = cls.open_unchecked(folder)
        damaged = damaged_shards(cache.folder, cache.layout, cache.checksums, remember=not verify)
        if damaged:
            raise ConfigurationError(
                f"the latent cache is damaged, because {'; '.join(damaged.values())}: {_WRITE_SHARDS}."
            )
        return cache

    @classmethod
    def open_unchecked(cls, folder: str | Path) -> Self:
        """As `open`, but the shards are not looked at."""
        folder = Path(folder)
        try:
            content = json.loads((folder / LAYOUT_FILE).read_text())
            if content["version"] != FORMAT_VERSION:
                raise ConfigurationError(
                    f"the latent cache {folder} has format {content['version']}, but this version reads format "
                    f"{FORMAT_VERSION}: {_WRITE_AGAIN}."
                )
            layout, checksums = CacheLayout.from_json(content), content.get("sha256")
            if checksums is not None and len(checksums) != layout.num_shards:
                raise TypeError("sha256")
            return cls(folder, layout, frozenset(content["unreadable"]), checksums)
        except (FileNotFoundError, NotADirectoryError):
            if any(folder.glob("*shard_*")):
                raise ConfigurationError(
                    f"the latent cache {folder} is not finished: run the same diffusers-srepa cache-latents command "
                    "again (option `latent_cache`)."
                ) from None
            raise ConfigurationError(
                f"there is no latent cache in {folder}: write it with diffusers-srepa cache-latents, or change or "
                "unset `latent_cache`."
            ) from None
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{folder / LAYOUT_FILE} is damaged ({type(error).__name__}): {_WRITE_AGAIN}."
            ) from error

    def check(
        self,
        *,
        fingerprint: str | None = None,
        encoder_id: str | None = None,
        resolution: int | None = None,
        flip: bool | None = None,
        rows: int | None = None,
    ) -> None:
        """Refuse to serve another dataset, encoder or resolution; what is None is not compared.

        Each argument is what the field of that name in `CacheLayout` must be; `flip`: if mirrored latents are needed.

        Raises:
            ConfigurationError: the first difference, and the option to change.
        """
        layout, wrong = self.layout, ""
        if resolution not in (None, layout.resolution):
            wrong = f"holds crops of {layout.resolution} pixels, but `resolution` is {resolution}: change `resolution`"
        elif encoder_id not in (None, layout.encoder_id):
            wrong = f"was written with the encoder {layout.encoder_id}, not with {encoder_id}: change the autoencoder"
            wrong += ", its precision"
        elif rows not in (None, layout.rows):
            wrong = f"holds {layout.rows} rows, but the dataset has {rows}: change `name_or_path`, `split`"
        elif fingerprint is not None and not same_images(fingerprint, layout.fingerprint):
            wrong = f"was written for another dataset (fingerprint {layout.fingerprint}, not {fingerprint}): change "
            wrong += "`name_or_path`, `split`"
        elif flip and not layout.flip:
            wrong = "holds no mirrored latents (`flip`), but `horizontal_flip` is on: change `horizontal_flip`"
        if wrong:
            raise ConfigurationError(
                f"the latent cache {self.folder} {wrong} or `latent_cache`, or write another cache with "
                "diffusers-srepa cache-latents."
            )

    def moments(self, row: int, flipped: bool = False) -> torch.Tensor:
        """Mean and standard deviation of the latent of `row`, float32, shape `(2C, h, w)`.

        Raises:
            DataError: the image of `row` could not be read when the cache was written.
            ConfigurationError: a file of the cache has gone since it was opened.
        """
        if row in self.unreadable:
            raise DataError(f"the image of row {row} of the dataset was unreadable when its latent was cached.")
        shard, place = divmod(row, self.layout.shard_rows)
        size = self.layout.bytes_per_row
        path = shard_file(self.folder, shard)
        try:
            if shard not in self._shards:
                self._shards[shard] = path.open("rb", buffering=0)
            # Read, not mapped: a process that touches the map of a file that was truncated is killed (SIGBUS).
            content = os.pread(self._shards[shard].fileno(), size, place * size)
            if len(content) != size:
                raise OSError(f"it ends before row {row}")
        except OSError as error:
            # Not a DataError, for which another row would step in, and another for each of its thousands.
            raise ConfigurationError(
                f"{path} of the latent cache cannot be read any more ({one_line(error)}): bring it back, or "
                f"{_WRITE_SHARDS}."
            ) from error
        copies = np.frombuffer(content, dtype=self.layout.dtype).reshape(self.layout.copies, *self.layout.shape)
        return torch.from_numpy(copies[int(flipped)].astype(np.float32))

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be pickled.
        return self.__dict__ | {"_shards": {}}
