"""The quickstart's scripts import one another as `python examples/quickstart/<script>.py` lets them."""

import sys
from pathlib import Path

import pytest


QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The folder of the quickstart's scripts and shipped networks."""
    return QUICKSTART


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as the quickstart writes them."""
    pytest.importorskip("sklearn")
    from digits import write_digits

    return write_digits(tmp_path_factory.mktemp("digits"))
