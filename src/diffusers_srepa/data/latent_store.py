"""The files of a latent cache, and reading them.

A cache is a folder of `shard_00000.bin, ...` and one `latents.json`. A shard holds `shard_rows` rows one after the
other (the last shard what is left), each `copies x 2C x h x w` numbers of one dtype: mean and standard deviation of
the latent, then the same of the mirrored image where the cache has it. Rows are read by number through a memory map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from diffusers_srepa.data.faults import one_line
from diffusers_srepa.data.fingerprint import same_images
from diffusers_srepa.data.transforms import CROP_RULE
from diffusers_srepa.errors import ConfigurationError, DataError


LAYOUT_FILE = "latents.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds; two caches with one layout hold the same numbers.

    Args:
        rows (`int`): rows of the dataset.
        shape (`tuple[int, int, int]`): `(2C, h, w)` of the moments of a row.
        dtype (`str`): `"float16"` or `"float32"`.
        flip (`bool`): whether the moments of the mirrored image follow those of the image.
        resolution (`int`): side of the encoded crops.
        codec_id (`str`): identity of the codec.
        fingerprint (`str`): identity of the dataset.
        shard_rows (`int`): rows per shard.
        crop (`str`): rule of the crop.
        version (`int`): version of this format.
    """

    rows: int
    shape: tuple[int, int, int]
    dtype: str
    flip: bool
    resolution: int
    codec_id: str
    fingerprint: str
    shard_rows: int
    crop: str = CROP_RULE
    version: int = FORMAT_VERSION

    @property
    def copies(self) -> int:
        """Latents per row."""
        return 2 if self.flip else 1

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row, its mirrored copy included."""
        return self.copies * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def rows_of(self, shard: int) -> range:
        """Rows that `shard` holds."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON holds it."""
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; further keys are left alone."""
        known = {field.name: content[field.name] for field in fields(cls)}
        return cls(**known | {"shape": tuple(content["shape"])})


def shard_file(folder: Path, shard: int) -> Path:
    """Path of a shard."""
    return folder / f"shard_{shard:05d}.bin"


class LatentCache:
    """Moments by row number, read-only; any number of processes and loader workers may read one cache.

    Args:
        folder (`Path`): the cache.
        layout (`CacheLayout`): what it holds.
        unreadable (`frozenset[int]`): rows whose image could not be read when the cache was written.
    """

    def __init__(self, folder: Path, layout: CacheLayout, unreadable: frozenset[int] = frozenset()) -> None:
        self.folder = folder
        self.layout = layout
        self.unreadable = unreadable
        self._shards: dict[int, np.ndarray] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        fingerprint: str | None = None,
        codec_id: str | None = None,
        resolution: int | None = None,
        flip: bool | None = None,
    ) -> Self:
        """Open a finished cache and compare it with what is needed; what is None is not compared.

        Args:
            folder (`str`): folder written by `cache_latents`.
            fingerprint (`str`, *optional*): fingerprint of the dataset.
            codec_id (`str`, *optional*): identity of the codec.
            resolution (`int`, *optional*): side of the crops.
            flip (`bool`, *optional*): whether mirrored latents are needed.

        Raises:
            ConfigurationError: the cache is missing, unfinished, damaged or made of something else.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / LAYOUT_FILE).read_text())
            if content["version"] != FORMAT_VERSION:
                raise ConfigurationError(
                    f"the latent cache {folder} has format {content['version']}, but this version reads format "
                    f"{FORMAT_VERSION}: write it again with diffusers-srepa cache-latents (option data.latent_cache)."
                )
            cache = cls(folder, CacheLayout.from_json(content), frozenset(content["unreadable"]))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigurationError(_why_missing(folder)) from None
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{folder / LAYOUT_FILE} is damaged ({type(error).__name__}): write the cache again with "
                "diffusers-srepa cache-latents (option data.latent_cache)."
            ) from error
        cache._check_files()
        cache.check(fingerprint=fingerprint, codec_id=codec_id, resolution=resolution, flip=flip)
        return cache

    def check(
        self,
        *,
        fingerprint: str | None = None,
        codec_id: str | None = None,
        resolution: int | None = None,
        flip: bool | None = None,
        rows: int | None = None,
    ) -> None:
        """Refuse to serve another dataset, codec or resolution; what is None is not compared.

        Raises:
            ConfigurationError: the first difference, and the option to change.
        """
        layout, again = self.layout, "or write another cache with diffusers-srepa cache-latents"
        if resolution is not None and resolution != layout.resolution:
            raise ConfigurationError(
                f"the latent cache {self.folder} holds crops of {layout.resolution} pixels, but data.resolution is "
                f"{resolution}: change data.resolution or data.latent_cache, {again}."
            )
        if codec_id is not None and codec_id != layout.codec_id:
            raise ConfigurationError(
                f"the latent cache {self.folder} was written with the codec {layout.codec_id}, but this run uses "
                f"{codec_id}: change latents.vae, latents.dtype or data.latent_cache, {again}."
            )
        if rows is not None and rows != layout.rows:
            raise ConfigurationError(
                f"the latent cache {self.folder} holds {layout.rows} rows, but the dataset has {rows}: change "
                f"data.dataset, data.split or data.latent_cache, {again}."
            )
        if fingerprint is not None and not same_images(fingerprint, layout.fingerprint):
            raise ConfigurationError(
                f"the latent cache {self.folder} was written for another dataset (fingerprint {layout.fingerprint}, "
                f"not {fingerprint}): change data.dataset, data.split or data.latent_cache, {again}."
            )
        if flip and not layout.flip:
            raise ConfigurationError(
                f"the latent cache {self.folder} holds no mirrored latents, but data.horizontal_flip is on: switch it "
                "off, or write another cache with diffusers-srepa cache-latents --flip."
            )

    def __len__(self) -> int:
        return self.layout.rows

    def moments(self, row: int, flipped: bool = False) -> torch.Tensor:
        """Mean and standard deviation of the latent of `row`, float32, shape `(2C, h, w)`.

        Raises:
            DataError: the image of `row` could not be read when the cache was written.
            ConfigurationError: a file of the cache has gone since it was opened.
        """
        if row in self.unreadable:
            raise DataError(f"the image of row {row} of the dataset was unreadable when its latent was cached.")
        shard, place = divmod(row, self.layout.shard_rows)
        return torch.from_numpy(self._shard(shard)[place, int(flipped)].astype(np.float32))

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._shards:
            layout, path = self.layout, shard_file(self.folder, shard)
            shape = (len(layout.rows_of(shard)), layout.copies, *layout.shape)
            try:
                self._shards[shard] = np.memmap(path, dtype=layout.dtype, mode="r", shape=shape)
            except (OSError, ValueError) as error:
                # Not a DataError, for which another row would step in, and another for each of its thousands.
                raise ConfigurationError(
                    f"{path} of the latent cache cannot be read any more ({one_line(error)}): bring it back, or write "
                    "the cache again with diffusers-srepa cache-latents (option data.latent_cache)."
                ) from error
        return self._shards[shard]

    def _check_files(self) -> None:
        for shard in range(self.layout.num_shards):
            path = shard_file(self.folder, shard)
            expected = len(self.layout.rows_of(shard)) * self.layout.bytes_per_row
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                raise ConfigurationError(
                    f"the latent cache is damaged, because {path} has {found} bytes instead of {expected}: write it "
                    "again with diffusers-srepa cache-latents (option data.latent_cache)."
                )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole shard into every loader process.
        return self.__dict__ | {"_shards": {}}


def _why_missing(folder: Path) -> str:
    if any(folder.glob("shard_*")):
        return (
            f"the latent cache {folder} is not finished: run the same diffusers-srepa cache-latents command again "
            "(option data.latent_cache)."
        )
    return (
        f"there is no latent cache in {folder}: write it with diffusers-srepa cache-latents, or change or unset "
        "data.latent_cache."
    )
