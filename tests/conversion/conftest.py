"""A tiny autoencoder and the command `convert`, without its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusers_srepa.conversion.convert import Conversion
from tests.helpers.convert_command import run_convert
from tests.helpers.tiny_run import write_vae


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an autoencoder with four latent channels."""
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    write_vae(folder)
    return str(folder)


@pytest.fixture
def convert(vae: str) -> Callable[..., Conversion]:
    """Runs the command with options as on the command line; `--vae` is there unless it is given."""

    def run(*options: Any, claim: Callable[[], str] | None = None) -> Conversion:
        return run_convert(vae, *options, claim=claim)

    return run


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """All files below a folder with their content, to see that nothing changed."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}

    return read
