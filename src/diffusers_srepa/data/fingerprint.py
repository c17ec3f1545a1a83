"""The identity of a dataset by its content.

The fingerprint of the datasets library depends on cache folders, on the time files were written and on how rows were
selected. Here the same images in the same order give the same value wherever and however often they are loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset


#: Datasets up to this size are hashed completely, larger ones by every size and name and this many images in full.
WHOLE_CONTENT_BYTES = 256 * 2**20
SAMPLED_IMAGES = 256

_ROWS_AT_A_TIME = 1_000


def dataset_fingerprint(dataset: Dataset, image_column: str, labels: np.ndarray | None) -> str:
    """Fingerprint of a map-style dataset, `"<images>-<labels>"`.

    Order and number of rows, the size and file name of every image, and the content of all images (of `SAMPLED_IMAGES`
    evenly spread ones beyond `WHOLE_CONTENT_BYTES`) decide the first part, the class of every row the second. A cache
    of latents depends on the first alone, see `same_images`. The image column is cast to `Image(decode=False)`.
    """
    images = dataset.select_columns([image_column])
    sizes, names = _sizes_and_names(images, image_column)
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{len(images)}\n".encode())
    digest.update(sizes.tobytes())
    digest.update("\n".join(names).encode())
    whole = int(sizes.clip(0).sum()) <= WHOLE_CONTENT_BYTES
    rows = range(len(images)) if whole else np.linspace(0, len(images) - 1, SAMPLED_IMAGES).astype(int).tolist()
    for row in rows:
        digest.update(_content(images[row][image_column]))
    label_digest = hashlib.blake2b(b"" if labels is None else labels.astype("<i8").tobytes(), digest_size=4)
    return f"{digest.hexdigest()}-{label_digest.hexdigest()}"


def stream_fingerprint(stream: IterableDataset, name: str, image_column: str, label_column: str | None) -> str:
    """Fingerprint of a stream, which cannot be read before it is used: its name, size, columns and first row."""
    first = next(iter(stream), None)
    sizes = {str(split): info.num_examples for split, info in (stream.info.splits or {}).items()}
    columns = {column: repr(feature) for column, feature in (stream.features or {}).items()}
    identity = [PurePath(name).name, str(stream.split), stream.num_shards, sizes, columns, image_column, label_column]
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8)
    if first is not None:
        cell = first[image_column]
        digest.update((cell.get("bytes") if isinstance(cell, dict) else None) or b"")
    return f"stream-{digest.hexdigest()}"


def on_background(fingerprint: str, background: tuple[int, int, int]) -> str:
    """The fingerprint of the same images with transparent pixels on `background`; white, the default, changes none."""
    images, dash, rest = fingerprint.partition("-")
    return fingerprint if background == (255, 255, 255) else f"{images}.{bytes(background).hex()}{dash}{rest}"


def same_images(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints are of the same images in the same order, whatever their labels."""
    return fingerprint.split("-")[0] == other.split("-")[0]


def _sizes_and_names(images: Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    """Bytes (-1: missing) and file name of every row's image; stored images are measured, not read."""
    sizes: list[np.ndarray] = []
    names: list[str] = []
    reader = images.with_format("arrow")
    for start in range(0, len(images), _ROWS_AT_A_TIME):
        # Chunk by chunk, because joining the chunks would copy the images.
        for cells in reader[start : start + _ROWS_AT_A_TIME].column(column).chunks:
            stored = np.array(pc.fill_null(pc.binary_length(pc.struct_field(cells, "bytes")), -1), dtype="<i8")
            paths = pc.struct_field(cells, "path").to_pylist()
            for row in np.flatnonzero(stored < 0):
                with suppress(OSError):
                    stored[row] = os.stat(paths[row]).st_size if paths[row] else -1
            sizes.append(stored)
            names += [PurePath(path).name if path else "" for path in paths]
    return np.concatenate(sizes) if sizes else np.empty(0, dtype="<i8"), names


def _content(cell: Any) -> bytes:
    if cell is None:
        return b""
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        with open(cell["path"], "rb") as file:
            return file.read()
    except (OSError, TypeError):
        return b""
