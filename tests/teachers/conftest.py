"""Tiny checkpoints of every family of teachers, and images for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.helpers.tiny_teachers import build_model, write_processor


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`checkpoint(kind)` is the folder of one tiny checkpoint with an image processor file, made once."""
    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            build_model(kind).save_pretrained(folder)
            write_processor(folder)
            made[kind] = str(folder)
        return made[kind]

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """Two images in [0, 1] of 48 x 48 pixels: no teacher's input size in these tests."""
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
