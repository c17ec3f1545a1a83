"""Whole runs against the Hub: everything taken from it by id, the result pushed to it, and its failures survived."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import HfApi, ModelCard

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.publishing import hub as publishing
from diffusers_srepa.publishing.hub import HubError
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.tiny_run import write_assets
from tests.hub.server import TOKEN, HubServer


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer(assets: Path, output_dir: Path, *options: str) -> Trainer:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir), "--training.max_steps", "2"]
    return Trainer(load_training_config([*arguments, "--push_to_hub", *options]))


def test_train_from_ids_and_push(hub: HubServer, assets: Path, tmp_path: Path) -> None:
    api = HfApi()
    for name, repo_type in (("vae", "model"), ("teacher", "model"), ("images", "dataset")):
        api.create_repo(f"tester/{name}", repo_type=repo_type)
        api.upload_folder(repo_id=f"tester/{name}", folder_path=assets / name, repo_type=repo_type)
    hub.log.clear()
    options = ["--latents.vae", "tester/vae", "--teacher.name_or_path", "tester/teacher"]
    options += ["--data.dataset", "tester/images", "--validation.every", "2"]
    run = trainer(assets, tmp_path / "my-run", *options)
    (tmp_path / "my-run" / "abandoned-checkpoint-1").mkdir(parents=True)
    for private in ("abandoned-checkpoint-1/config.yaml", "id_rsa"):
        (tmp_path / "my-run" / private).write_text("private")
    run.train()

    repository = hub.model("tester/my-run")
    assert len(repository.history("main")) == 2 and not repository.private
    files = repository.resolve("main").files
    assert {path.split("/")[0] for path in files} == {
        ".gitattributes",
        "README.md",
        "config.yaml",
        "model_index.json",
        "projectors",
        "sample_grid.png",
        "scheduler",
        "transformer",
        "vae",
    }
    assert not any(TOKEN.encode() in blob.content for blob in files.values())
    for path in (tmp_path, assets):
        assert not any(str(path).encode() in blob.content for blob in files.values())
    card = ModelCard.load("tester/my-run")
    assert card.data.datasets == ["tester/images"]
    assert "[tester/teacher](https://huggingface.co/tester/teacher)" in card.text
    assert "| Steps | 2 |" in card.text and "| Aligned block | 1 (counted from 1) |" in card.text
    assert str(tmp_path) not in card.content and str(assets) not in card.content
    pipe = SiTPipeline.from_pretrained("tester/my-run")
    assert pipe("newt", num_inference_steps=2).images[0].size == (16, 16)
    assert {entry.token for entry in hub.requests(origin="cdn")} == {None}


def test_refusals_come_before_anything_is_loaded(
    hub: HubServer, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="401"):
        trainer(assets, tmp_path / "run", "--data.dataset", str(tmp_path / "not-there"))
    assert not (tmp_path / "run").exists()


def test_a_hub_that_fails_at_the_end_costs_a_warning(
    hub: HubServer, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(assets, tmp_path / "run", "--hub_model_id", "test-org/local", "--hub_private")
    assert hub.model("test-org/local").private
    hub.fail("POST", "/commit/", status=503, times=100)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with caplog.at_level(logging.WARNING):
        run.train()
    warnings = [record.getMessage() for record in caplog.records if "was not pushed" in record.getMessage()]
    assert len(warnings) == 1 and "503" in warnings[0] and str(tmp_path / "run") in warnings[0]
    assert TOKEN not in caplog.text
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| Data | a local dataset |" in card and str(assets) not in card and str(tmp_path) not in card
    SiTPipeline.from_pretrained(tmp_path / "run")


def test_training_ends_with_a_hub_that_never_answers_and_says_so_once(
    hub: HubServer, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(assets, tmp_path / "run")
    monkeypatch.setattr(publishing, "_SILENCE", 0.2)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as listener, caplog.at_level(logging.WARNING):
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        run.train()
    said = [record.getMessage() for record in caplog.records if address in record.getMessage()]
    assert len(said) == 1 and "was not pushed" in said[0] and "cannot be reached" in said[0]
    SiTPipeline.from_pretrained(tmp_path / "run")
