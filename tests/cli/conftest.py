"""Shared parts of the tests of the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState

from diffusers_srepa.cli.main import main
from tests.helpers.tiny_run import write_assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `vae/`, `teacher/`, `images/` and `config.yaml`, all tiny and real."""
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def call() -> Callable[..., int]:
    """Calls the command with words as a shell would, and returns its exit code."""

    def run(*words: Any) -> int:
        try:
            return main([str(word) for word in words])
        except SystemExit as leave:
            return leave.code if isinstance(leave.code, int) else 1
        finally:
            # Accelerate keeps precision and device for the whole process; every run starts its own.
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()

    return run


@pytest.fixture(scope="session")
def train(assets: Path, call: Callable[..., int]) -> Callable[..., list[dict[str, Any]]]:
    """Trains on the assets in one process, and returns the logged values."""

    def run(output_dir: Path, *options: Any) -> list[dict[str, Any]]:
        assert call("train", "--config", assets / "config.yaml", "--output_dir", output_dir, *options) == 0
        return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture(scope="session")
def finished(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, "--training.max_steps", 2, "--checkpoints.every", 1)
    return folder
