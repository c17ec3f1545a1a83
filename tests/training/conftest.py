"""Shared parts of the training tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests.helpers.tiny_run import write_assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `vae/`, `teacher/`, `images/` and `config.yaml`, all tiny and real."""
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    # Accelerate keeps precision and device for the whole process; every test starts its own run.
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
