"""What the Hub answers is told alike for teachers, autoencoders and pipelines to continue from."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.models.loading import find_folder, load_transformer, read_transformer_config
from diffusers_srepa.teachers.auto_teacher import Teacher
from tests.helpers.tiny_run import write_vae
from tests.hub.server import HubServer


LOADERS: dict[str, Callable[[str], object]] = {
    "teacher": Teacher.from_pretrained,
    "autoencoder": AutoencoderKLLatents.from_pretrained,
    "pipeline": read_transformer_config,
}
REPO = "tester/model"


@pytest.fixture(params=LOADERS)
def refused(request: pytest.FixtureRequest, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """What loading a name says."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    files = dict.fromkeys(("config.json", "transformer/config.json", "vae/config.json"), "{}")
    hub.add_repository(REPO, {**files})
    argument = "`source`" if request.param == "pipeline" else "`name_or_path`"

    def load(name: str) -> str:
        with pytest.raises(ConfigurationError) as caught:
            LOADERS[request.param](name)
        text = str(caught.value)
        assert "\n" not in text and text.endswith(".") and name in text and request.param in text
        assert "`" not in text or argument in text
        return text

    return load


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_is_no_missing_file(refused: Callable[[str], str], hub: HubServer, status: int) -> None:
    for method in ("HEAD", "GET"):
        hub.fail(method, REPO, status=status, times=1000)
    text = refused(REPO)
    assert "cannot be fetched from the Hub now" in text and str(status) in text and "try again later" in text


def test_a_gated_repository_exists(refused: Callable[[str], str], hub: HubServer) -> None:
    gate = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}
    for method in ("HEAD", "GET"):
        hub.fail(method, "/resolve/", status=403, times=1000, headers=gate)
    assert "is gated: accept its conditions" in refused(REPO)


@pytest.mark.parametrize("name", ["tester/none", "/no/such/folder", "./no/such/folder"])
def test_what_is_nowhere(refused: Callable[[str], str], name: str) -> None:
    assert "is neither a local folder or file nor a Hub repository that you can see" in refused(name)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network(
    refused: Callable[[str], str], hub: HubServer, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    for method in ("HEAD", "GET"):
        hub.fail(method, "", status=None, times=1000)
    assert "neither a local folder nor in the cache, and the Hub was not asked" in refused(REPO)


def test_what_a_repository_lacks_is_said_so(hub: HubServer) -> None:
    hub.add_repository(REPO, {"README.md": "# nothing"})
    with pytest.raises(ConfigurationError, match=r"no autoencoder was found at tester/model .* has no config\.json"):
        AutoencoderKLLatents.from_pretrained(REPO)
    with pytest.raises(ConfigurationError, match="no folder transformer with a config.json"):
        find_folder(REPO)


def test_an_autoencoder_inside_a_pipeline_loads_offline(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vae(tmp_path / "vae")
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path)
    first = AutoencoderKLLatents.from_pretrained(REPO).encoder_id
    assert AutoencoderKLLatents.from_pretrained(REPO, local_files_only=True).encoder_id == first


def test_weights_that_cannot_be_fetched(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration is there, so that only the second request fails."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    config = '{"_class_name": "SiTTransformer2DModel", "num_layers": 1}'
    hub.add_repository(REPO, {"transformer/config.json": config})
    for method in ("HEAD", "GET"):
        hub.fail(method, r"/resolve/.*(safetensors|bin)", status=429, times=1000)
    with pytest.raises(ConfigurationError, match="the transformer of `source` tester/model cannot be fetched.*429"):
        load_transformer(REPO)
