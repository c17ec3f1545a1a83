"""The files of a latent cache.

A cache is a folder of `shard_00000.bin, ...` and one `latents.json`. A shard holds `shard_rows` rows one after the
other (the last shard what is left), each `copies x 2C x h x w` numbers of one dtype: mean and standard deviation of
the latent, then the same of the mirrored image where the cache has it. While it is being written, `latents.json` is
called `latents.incomplete.json`. Beside a finished shard lies `shard_00000.json` with its unreadable rows and its
SHA-256; `latents.json` has those of all shards. Caches of earlier versions of this package have no checksums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from diffusers_srepa.data.images import CROP_RULE


LAYOUT_FILE = "latents.json"
INCOMPLETE_LAYOUT_FILE = "latents.incomplete.json"
FORMAT_VERSION = 1

#: Fields that have another name in the file.
_KEYS = {"encoder_id": "codec_id"}


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds; two caches with one layout hold the same numbers.

    Args:
        rows (`int`): rows of the dataset.
        shape (`tuple[int, int, int]`): `(2C, h, w)` of the moments of a row.
        dtype (`str`): `"float16"` or `"float32"`.
        flip (`bool`): whether the moments of the mirrored image follow those of the image.
        resolution (`int`): side of the encoded crops.
        encoder_id (`str`): identity of the encoder, see `LatentSpace`.
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
    encoder_id: str
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
        return {_KEYS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; further keys are left alone."""
        known = {field.name: content[_KEYS.get(field.name, field.name)] for field in fields(cls)}
        return cls(**known | {"shape": tuple(content["shape"])})


def shard_file(folder: Path, shard: int) -> Path:
    """Path of a shard."""
    return folder / f"shard_{shard:05d}.bin"


def done_file(folder: Path, shard: int) -> Path:
    """Path of the file that says that a shard is finished, and which of its rows could not be read."""
    return folder / f"shard_{shard:05d}.json"
