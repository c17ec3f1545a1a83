"""Settings of the whole suite: no network, one thread per process.

The tests in `tests/hub` talk to a hub on the loopback interface. Libraries freeze the hub's address when they are
imported, so those tests run in a process of their own: `SREPA_HUB_TESTS=1 pytest tests/hub` (`make test` runs both).
"""

import os


HUB_TESTS = os.environ.get("SREPA_HUB_TESTS") == "1"

if not HUB_TESTS:
    os.environ["HF_HUB_OFFLINE"] = "1"
    collect_ignore = ["hub"]
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
