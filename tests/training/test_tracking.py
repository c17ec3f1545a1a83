"""Trackers that cannot be reached cost a warning, never a run, and get what they missed at its end."""

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.tracking import GeneralTracker

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.run_losses import before_step
from tests.helpers.tiny_run import write_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("assets"))


class SocketTracker(GeneralTracker):
    """Sends every value to a port, as trackers do; a connection that is refused raises."""

    name = "socket"
    requires_logging_directory = False
    port = 0

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self._send({"start": run_name})

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._send({"step": step, **values})

    def _send(self, message: dict[str, Any]) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(json.dumps(message).encode())


def _received(server: socket.socket) -> list[dict[str, Any]]:
    server.settimeout(0.2)
    messages = []
    while True:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return messages
        messages.append(json.loads(b"".join(iter(lambda c=connection: c.recv(65536), b""))))


@pytest.mark.parametrize("fails_from", ["the start", "step 2"])
def test_what_a_tracker_missed_is_sent_at_the_end(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_from: str
) -> None:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(tmp_path / "run")]
    server = socket.create_server(("127.0.0.1", 0), backlog=50)
    free = socket.create_server(("127.0.0.1", 0))
    closed_port = free.getsockname()[1]
    free.close()
    monkeypatch.setattr(SocketTracker, "port", closed_port if fails_from == "the start" else server.getsockname()[1])
    trainer = Trainer(load_training_config(arguments))
    monkeypatch.setattr(trainer.accelerator, "log_with", ["socket"])
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "socket", SocketTracker)
    # The port closes before step 2 is logged and opens again with the last step.
    if fails_from != "the start":
        before_step(trainer, 1, lambda: setattr(SocketTracker, "port", closed_port))
    before_step(trainer, 3, lambda: setattr(SocketTracker, "port", server.getsockname()[1]))
    with caplog.at_level(logging.INFO):
        trainer.train()
    messages = _received(server)
    server.close()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [message["step"] for message in messages if "step" in message] == [1, 2, 3, 4]
    assert [message["loss"] for message in messages if "step" in message] == [record["loss"] for record in logged]
    assert caplog.text.count("the tracker failed") == 1
    assert (tmp_path / "run" / "model_index.json").exists()
