"""`diffusers-srepa convert --push_to_hub`: an official checkpoint becomes a repository that loads by its id."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from diffusers_srepa.alignment.projectors import MLPProjector
from diffusers_srepa.cli.main import main
from diffusers_srepa.pipelines.hub import SiTPipeline
from tests.helpers.reference_sit import random_projector, random_state
from tests.helpers.tiny_run import write_vae
from tests.hub.server import TOKEN, HubServer


REPO = "tester/converted-sit"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    torch.save({"ema": random_state(depth=1) | random_projector("mlp"), "steps": 4000}, tmp_path / "a.pt")
    write_vae(tmp_path / "vae")
    files = ["--checkpoint", str(tmp_path / "a.pt"), "--vae", str(tmp_path / "vae")]
    return ["convert", *files, "--output_dir", str(tmp_path / "out"), "--num_attention_heads", "4"]


def test_a_converted_checkpoint_is_pushed_and_loads_by_its_id(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main([*words, "--push_to_hub", "--hub_model_id", REPO]) == 0
    files = HfApi().list_repo_files(REPO)
    assert {"model_index.json", "README.md", "projectors/default/config.json"} <= set(files)
    assert REPO in ModelCard.load(REPO).content
    pushed = SiTPipeline.from_pretrained(REPO)
    local = SiTPipeline.from_pretrained(tmp_path / "out")
    for name, weight in local.transformer.named_parameters():
        assert torch.equal(weight, pushed.transformer.get_parameter(name)), name
    projector = MLPProjector.from_pretrained(REPO, subfolder="projectors/default")
    assert projector.config.in_dim == local.transformer.inner_dim
    for file in files:
        if file.endswith((".json", ".md", ".yaml")):
            assert str(tmp_path) not in (Path(HfApi().hf_hub_download(REPO, file))).read_text(), file


def test_without_a_token_nothing_is_written(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main([*words, "--push_to_hub", "--hub_model_id", REPO]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no Hugging Face token was found" in error
    assert not (tmp_path / "out").exists()
