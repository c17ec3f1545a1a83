"""Reading one encoded image of a dataset: what can go wrong with a file, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Image

from diffusers_srepa.data.faults import is_outage, one_line
from diffusers_srepa.data.transforms import training_crop
from diffusers_srepa.errors import DataError


# The library's own decoder: Pillow, EXIF rotation applied, files and remote paths opened where bytes are not stored.
_DECODER = Image()


def read_crop(cell: Any, size: int, tokens: Mapping[str, Any] | None = None) -> torch.Tensor:
    """The training crop of an image as it is stored in a dataset.

    Args:
        cell: `{"bytes": ..., "path": ...}`, as an Image column with `decode=False` gives it; bytes or a path.
        size (`int`): side of the crop.
        tokens (`Mapping`, *optional*): Hub tokens by repository, for paths on the Hub.

    Returns:
        `torch.Tensor`: uint8, shape `(3, size, size)`.

    Raises:
        DataError: there is no image, or its file cannot be decoded; the sentence begins with "it".
        ConnectionError: network, server or machine failed, which says nothing about the image.
        MemoryError: there is too little memory to decode it.
    """
    stored = _stored(cell)
    if stored is None:
        raise DataError("it holds no image.")
    try:
        return training_crop(_DECODER.decode_example(stored, token_per_repo_id=dict(tokens or {})), size)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds of exceptions for broken files.
        if is_outage(error):
            raise ConnectionError(f"{_reason(error)}{_where(stored)}") from error
        raise DataError(f"it cannot be decoded{_where(stored)}: {_reason(error)}.") from error


def _stored(cell: Any) -> dict[str, Any] | None:
    if isinstance(cell, bytes):
        return {"bytes": cell, "path": None}
    if isinstance(cell, str):
        return {"bytes": None, "path": cell}
    if not isinstance(cell, Mapping) or (cell.get("bytes") is None and cell.get("path") is None):
        return None
    return {"bytes": cell.get("bytes"), "path": cell.get("path")}


def _where(stored: Mapping[str, Any]) -> str:
    return f" (file {stored['path']})" if stored["path"] else ""


def _reason(error: Exception) -> str:
    # Pillow names the buffer it read from by its address, which tells nobody anything.
    return re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "its bytes", one_line(error))
