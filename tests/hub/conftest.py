"""Hub tests run against a loopback server, in a pytest process of their own:

    SREPA_HUB_TESTS=1 python -m pytest tests/hub

Every Hub library freezes its endpoint when it is imported, so the server starts here, at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub.server import ENVIRONMENT_TO_UNSET, HubServer


ENABLED = os.environ.get("SREPA_HUB_TESTS") == "1"
collect_ignore_glob = [] if ENABLED else ["test_*.py"]
REPOSITORY_ROOT = Path(__file__).parents[2]

if ENABLED:
    early = [name for name in ("huggingface_hub", "datasets", "diffusers", "transformers") if name in sys.modules]
    if early:
        raise pytest.UsageError(f"{early[0]} was imported before the Hub server started: run tests/hub by itself")
    _server = HubServer()
    _server.start()
    _home = tempfile.TemporaryDirectory(prefix="hub-tests-")
    for _name in ENVIRONMENT_TO_UNSET:
        os.environ.pop(_name, None)
    os.environ |= _server.environment(_home.name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, empty, with empty client caches; what subprocesses inherit points there too."""
    import datasets.config
    import huggingface_hub.constants

    _server.reset()
    home = tmp_path / "hf-home"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(home / "modules"))
    yield _server
    _server.reset()


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python() -> RunPython:
    """Run code in a new process that inherits the Hub's environment; keyword arguments are further variables."""

    def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(REPOSITORY_ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, **variables}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    return run


def pytest_configure(config: pytest.Config) -> None:
    """Warnings that the clients raise about their own dependencies."""
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:The `local_dir_use_symlinks` argument:UserWarning")
