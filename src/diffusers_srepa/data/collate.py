"""From the items of a dataset to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack the entries of `items`, tensors or numbers, along a new first dimension; all items have the same keys."""
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}
