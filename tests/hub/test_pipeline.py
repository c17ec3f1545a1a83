"""`SiTPipeline` on the Hub: pushed in every way, loaded by id, revision, dtype, variant, offline and in private."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi, ModelCard

from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.publishing.card_facts import ModelCardFacts
from diffusers_srepa.publishing.hub import create_repository, push_folder
from diffusers_srepa.publishing.model_card import write_model_card
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from tests.hub.server import TOKEN, HubServer


REPO = "tester/tiny-sit"
FACTS = ModelCardFacts(
    model_name="SiT-tiny/2",
    num_parameters=1234,
    resolution=16,
    num_classes=3,
    dataset="tester/digits",
    method="srepa-mse",
    steps=10,
    global_batch_size=8,
    learning_rate=1e-3,
    ema_decay=0.9,
    precision="fp32",
    vae="tester/vae",
    teacher="facebook/dinov2-base",
    depth=1,
    terms={"cosine": 1.0, "gram_mse": 2.0},
    id2label={0: "zero, naught", 1: "one", 2: "two"},
    num_inference_steps=2,
    hub_id=REPO,
    license="mit",
)


@pytest.fixture
def pipe() -> SiTPipeline:
    transformer = SiTTransformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            # A freshly initialised SiT predicts exactly zero, whatever is loaded.
            parameter.add_(0.02 * torch.randn_like(parameter))
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, **_TWO_BLOCKS)
    labels = {"0": "zero, naught", "1": "one", "2": "two"}
    return SiTPipeline(transformer, vae, FlowMatchEulerMaruyamaScheduler(), id2label=labels)


_TWO_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def sample(pipe: SiTPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(["one"], num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="pt").images


def finished_run(pipe: SiTPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    pipe.transformer.save_pretrained(folder / "projectors" / "default")
    (folder / "config.yaml").write_text("seed: 0\n")
    write_model_card(folder, config={"seed": 0}, facts=FACTS)
    return folder


@pytest.fixture
def pushed(hub: HubServer, pipe: SiTPipeline, tmp_path: Path) -> SiTPipeline:
    """The pipeline that is in the repository, pushed as the trainer does."""
    push_folder(finished_run(pipe, tmp_path / "run"), create_repository(REPO))
    hub.log.clear()
    return pipe


def downloads(hub: HubServer) -> set[str]:
    """Paths of the files that were asked for and found."""
    found = [entry.path for entry in hub.requests(path="/resolve/", origin="hub") if entry.status < 400]
    return {re.sub(r".*/resolve/[^/]+/", "", path) for path in found}


def test_load_by_id(hub: HubServer, pushed: SiTPipeline) -> None:
    loaded = SiTPipeline.from_pretrained(REPO)
    assert torch.equal(sample(loaded), sample(pushed))
    assert loaded.get_label_ids("naught") == [0]
    assert isinstance(loaded.scheduler, FlowMatchEulerMaruyamaScheduler)
    assert not any(path.startswith("projectors/") or path == "config.yaml" for path in downloads(hub))
    assert {entry.token for entry in hub.requests(origin="cdn")} == {None}


def test_the_card_in_the_repository_is_ours_and_its_example_runs(
    hub: HubServer, pushed: SiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = ModelCard.load(REPO)
    assert card.data.tags == [
        "class-to-image",
        "image-generation",
        "flow-matching",
        "sit",
        "representation-alignment",
        "srepa",
    ]
    assert HfApi().model_info(REPO).library_name == "diffusers"
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exec(compile(code.group(1), "card", "exec"), {})
    assert (tmp_path / "sample.png").stat().st_size > 0


def test_load_by_revision(hub: HubServer, pushed: SiTPipeline, tmp_path: Path) -> None:
    HfApi().create_tag(REPO, tag="v1")
    old = hub.model(REPO).resolve("main").oid
    before = sample(pushed)
    with torch.no_grad():
        for parameter in pushed.transformer.parameters():
            parameter.mul_(1.5)
    push_folder(finished_run(pushed, tmp_path / "run"), REPO)
    after = sample(pushed)
    assert not torch.equal(before, after)
    for revision, expected in (("v1", before), (old, before), ("main", after), (None, after)):
        assert torch.equal(sample(SiTPipeline.from_pretrained(REPO, revision=revision)), expected), revision
    with pytest.raises(OSError, match="v2"):
        SiTPipeline.from_pretrained(REPO, revision="v2")


def test_load_with_dtype(hub: HubServer, pushed: SiTPipeline) -> None:
    loaded = SiTPipeline.from_pretrained(REPO, dtype=torch.bfloat16)
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16
    assert sample(loaded).isfinite().all()


def test_load_variant(hub: HubServer, pushed: SiTPipeline, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in pushed.transformer.parameters():
            parameter.mul_(0.5)
    pushed.save_pretrained(tmp_path / "ema", variant="ema")
    push_folder(tmp_path / "ema", REPO)
    hub.log.clear()
    loaded = SiTPipeline.from_pretrained(REPO, variant="ema")
    assert torch.equal(sample(loaded), sample(pushed))
    weights = {path for path in downloads(hub) if path.endswith(".safetensors")}
    assert weights == {f"{component}/diffusion_pytorch_model.ema.safetensors" for component in ("transformer", "vae")}
    plain = SiTPipeline.from_pretrained(REPO)
    assert not torch.equal(sample(plain), sample(pushed))


def test_passed_components_are_not_downloaded(hub: HubServer, pushed: SiTPipeline) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    loaded = SiTPipeline.from_pretrained(REPO, vae=pushed.vae, scheduler=scheduler)
    assert loaded.vae is pushed.vae and loaded.scheduler is scheduler
    assert not any(path.startswith(("vae/", "scheduler/")) for path in downloads(hub))
    assert sample(loaded).isfinite().all()


def test_a_warm_cache_downloads_nothing(hub: HubServer, pushed: SiTPipeline) -> None:
    SiTPipeline.from_pretrained(REPO)
    hub.log.clear()
    SiTPipeline.from_pretrained(REPO)
    assert hub.requests("GET", "/resolve/") == [] and hub.requests(origin="cdn") == []


def test_local_files_only(hub: HubServer, pushed: SiTPipeline) -> None:
    with pytest.raises(OSError):
        SiTPipeline.from_pretrained(REPO, local_files_only=True)
    SiTPipeline.from_pretrained(REPO)
    hub.log.clear()
    loaded = SiTPipeline.from_pretrained(REPO, local_files_only=True)
    assert torch.equal(sample(loaded), sample(pushed)) and hub.log == []


def test_private_repository(
    hub: HubServer, pipe: SiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo_id = create_repository("tester/private-sit", private=True)
    push_folder(finished_run(pipe, tmp_path / "run"), repo_id)
    with pytest.raises(OSError, match="tester/private-sit"):
        SiTPipeline.from_pretrained(repo_id, token=False)
    assert torch.equal(sample(SiTPipeline.from_pretrained(repo_id)), sample(pipe))
    # The token as an argument, where the environment has none.
    monkeypatch.delenv("HF_TOKEN")
    loaded = SiTPipeline.from_pretrained(repo_id, token=TOKEN, cache_dir=tmp_path / "another")
    assert torch.equal(sample(loaded), sample(pipe))


def test_what_is_no_pipeline(hub: HubServer) -> None:
    hub.add_repository("tester/words", {"config.json": "{}"})
    with pytest.raises(OSError, match=r"model_index\.json"):
        SiTPipeline.from_pretrained("tester/words")


def test_push_to_hub_of_the_pipeline_keeps_the_card(hub: HubServer, pushed: SiTPipeline) -> None:
    card = hub.model(REPO).resolve("main").files["README.md"].content
    with torch.no_grad():
        pushed.transformer.pos_embed.add_(0.5)
    pushed.push_to_hub(REPO, commit_message="again")
    head = hub.model(REPO).resolve("main")
    assert head.title == "again" and head.files["README.md"].content == card
    assert len(hub.requests("POST", "/commit/")) == 1
    assert "projectors/default/config.json" in head.files
    assert torch.equal(sample(SiTPipeline.from_pretrained(REPO)), sample(pushed))


def test_a_new_pipeline_gets_a_card_of_its_own(
    hub: HubServer, pipe: SiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the `README.md` of whatever project the process runs in."""
    (tmp_path / "README.md").write_text("# Another project\n")
    monkeypatch.chdir(tmp_path)
    pipe.push_to_hub("tester/new")
    card = hub.model("tester/new").resolve("main").files["README.md"].content
    assert b"Another project" not in card and b"diffusers" in card


def test_save_and_push_in_one_call_keeps_the_card(hub: HubServer, pipe: SiTPipeline, tmp_path: Path) -> None:
    folder = finished_run(pipe, tmp_path / "my-run")
    card = (folder / "README.md").read_bytes()
    pipe.save_pretrained(folder, push_to_hub=True)
    assert hub.model("tester/my-run").resolve("main").files["README.md"].content == card
    assert (folder / "README.md").read_bytes() == card


def test_model_and_scheduler_alone(hub: HubServer, pushed: SiTPipeline) -> None:
    transformer = SiTTransformer2DModel.from_pretrained(REPO, subfolder="transformer")
    assert all(
        torch.equal(a, b) for a, b in zip(transformer.parameters(), pushed.transformer.parameters(), strict=True)
    )
    scheduler = FlowMatchEulerMaruyamaScheduler.from_pretrained(REPO, subfolder="scheduler")
    assert scheduler.config.path_type == "linear"
    transformer.push_to_hub("tester/alone")
    again = SiTTransformer2DModel.from_pretrained("tester/alone")
    assert torch.equal(again.pos_embed, transformer.pos_embed)
    index = json.loads(hub.model(REPO).resolve("main").files["model_index.json"].content)
    assert index["transformer"] == ["diffusers_srepa.models.transformer_sit", "SiTTransformer2DModel"]
