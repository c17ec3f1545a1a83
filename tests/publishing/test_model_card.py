"""The model card of a trained pipeline: what it says, that it is valid, that nothing local or secret gets into it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.publishing.card_facts import ModelCardFacts, package_versions
from diffusers_srepa.publishing.licences import licence_note
from diffusers_srepa.publishing.model_card import write_model_card
from diffusers_srepa.publishing.redaction import public_config, public_versions
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from diffusers_srepa.training.card_facts import facts_from_config
from diffusers_srepa.training.methods.card_facts import alignment_facts
from tests.hub.card_rules import validate_card


FACTS = ModelCardFacts(
    model_name="SiT-XL/2",
    num_parameters=675_129_632,
    resolution=256,
    num_classes=1000,
    dataset="ILSVRC/imagenet-1k",
    method="srepa-mse",
    steps=400_000,
    global_batch_size=256,
    learning_rate=1e-4,
    ema_decay=0.9999,
    precision="bf16",
    vae="stabilityai/sd-vae-ft-mse",
    teacher="facebook/dinov2-base",
    depth=8,
    terms={"cosine": 1.0, "gram_mse": 2.0},
    id2label={0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus"},
    guidance_scale=1.325,
    losses={"flow": 0.512345678, "cosine": -0.75},
    hub_id="me/sit-xl-2-srepa",
    license="cc-by-nc-4.0",
)


def card_of(folder: Path, facts: ModelCardFacts, config: dict[str, Any] | None = None) -> tuple[ModelCard, str]:
    folder.mkdir(exist_ok=True)
    path = write_model_card(folder, config=config or {}, facts=facts)
    text = path.read_text(encoding="utf-8")
    warnings, errors = validate_card(text, "model")
    assert (warnings, errors) == ([], [])
    assert "{{" not in text and "{%" not in text and "None" not in text
    return ModelCard.load(path), text


def test_front_matter(tmp_path: Path) -> None:
    card, _ = card_of(tmp_path, FACTS)
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "license": "cc-by-nc-4.0",
        "datasets": ["ILSVRC/imagenet-1k"],
        "tags": ["class-to-image", "image-generation", "flow-matching", "sit", "representation-alignment", "srepa"],
    }


def test_body_states_the_settings(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, FACTS)
    for statement in (
        "# sit-xl-2-srepa\n",
        "675,129,632 parameters",
        "256 x 256 pixels of 1000 classes",
        "| Data | [ILSVRC/imagenet-1k](https://huggingface.co/datasets/ILSVRC/imagenet-1k) |",
        "| Teacher | [facebook/dinov2-base](https://huggingface.co/facebook/dinov2-base) |",
        "in the latents of [stabilityai/sd-vae-ft-mse](https://huggingface.co/stabilityai/sd-vae-ft-mse)",
        "| Method (preset) | srepa-mse |",
        "| Aligned block | 8 (counted from 1) |",
        "| Weight of `cosine` | 1.0 |\n| Weight of `gram_mse` | 2.0 |",
        "| Steps | 400,000 |",
        "| Global batch size | 256 |",
        "| Learning rate | 0.0001 |",
        "| Precision | bf16 |",
        "| Saved weights | moving average, decay 0.9999 |",
        f"| torch | {package_versions()['torch']} |",
        "| flow | 0.51235 |",
        'from_pretrained("me/sit-xl-2-srepa")',
        "guidance_scale=1.325",
        'class_labels=["tench"]',
        "0: tench, Tinca tinca; 1: goldfish, Carassius auratus.",
        "No metric of image quality was measured",
        "- These weights: cc-by-nc-4.0.",
        "check the licence of [facebook/dinov2-base]",
        "check the terms of [ILSVRC/imagenet-1k]",
    ):
        assert statement in text, statement


def test_metrics_are_shown_only_where_measured(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, replace(FACTS, metrics={"FID (50,000 samples)": 8.312345}))
    assert "| FID (50,000 samples) | 8.3123 |" in text
    assert "No metric" not in text


def test_local_sources_are_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home-of-alice"
    (home / "data" / "digits").mkdir(parents=True)
    (home / "ours" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(home)
    facts = replace(
        FACTS,
        dataset="data/digits",
        teacher="ours/teacher",
        vae=str(home / "vae"),
        init_from="../elsewhere/run",
        hub_id=None,
    )
    config = {
        "output_dir": "runs/secret-project",
        "hub_token": "plain",
        "data": {"dataset": "data/digits", "cache_dir": "big/disk", "latent_cache": "moments", "split": "train"},
        "teacher": {"name_or_path": "ours/teacher"},
        "latents": {"vae": str(home / "vae")},
        "model": {"init_from": "../elsewhere/run", "preset": "SiT-B/2"},
        "tracking": {"note": "key hf_AbCdEfGh0123 inside", "windows": "C:\\Users\\alice"},
        "alignment": {"drop_class_token": True, "terms": {"cosine": {"weight": 1.0, "files": [home / "x"]}}},
    }
    card, text = card_of(tmp_path / "out", facts, config)
    for leak in ("alice", "digits", "ours", "elsewhere", "secret-project", "big/disk", "moments", "plain", "hf_Ab"):
        assert leak not in text, leak
    assert "| Data | a local dataset |" in text
    assert "| Teacher | a local vision encoder |" in text
    assert "in the latents of a local autoencoder" in text
    assert "starting from a local pipeline" in text
    assert "# SiT-XL/2, srepa-mse\n" in text
    assert "datasets" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert shown["alignment"]["drop_class_token"] is True
    assert shown["model"]["preset"] == "SiT-B/2"
    assert shown["data"]["split"] == "train"


def test_loader_names_and_urls_are_no_dataset_ids(tmp_path: Path) -> None:
    for source in (
        "imagefolder",
        "parquet",
        "https://host/x.tar?sig=abc",
        "hf://datasets/me/x",
        "images.tar",
        "a/b/c",
    ):
        card, text = card_of(tmp_path, replace(FACTS, dataset=source))
        assert "| Data | a local dataset |" in text, source
        assert "datasets" not in card.data.to_dict(), source


def test_the_default_configuration_is_shown_whole(tmp_path: Path) -> None:
    config = TrainingConfig(output_dir="runs/xl").to_dict()
    shown = public_config(config)
    assert shown.pop("output_dir") == "(local)"
    del config["output_dir"]
    assert shown == config


def test_base_model_is_the_pipeline_that_training_started_from(tmp_path: Path) -> None:
    card, text = card_of(tmp_path, replace(FACTS, init_from="me/earlier"))
    assert card.data.base_model == "me/earlier"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "starting from [me/earlier]" in text


def test_pixels_without_teacher_and_without_licence(tmp_path: Path) -> None:
    facts = replace(
        FACTS,
        vae="pixels",
        teacher=None,
        terms={},
        depth=None,
        method="sit",
        license=None,
        ema_decay=0.0,
        id2label=None,
        num_classes=1,
    )
    card, text = card_of(tmp_path, facts)
    assert "in pixel space" in text and "autoencoder" not in text
    assert "Teacher" not in text and "aligned" not in text and "Aligned" not in text
    assert "of 1 class." in text and "class_labels=[0]" in text
    assert "no licence has been chosen" in text and "license" not in card.data.to_dict()
    assert "| Saved weights | the last step's |" in text
    assert card.data.tags == ["class-to-image", "image-generation", "flow-matching", "sit"]


def test_other_licence_carries_its_name_and_link(tmp_path: Path) -> None:
    facts = replace(FACTS, license="other", license_name="my-licence", license_link="LICENSE.md")
    card, text = card_of(tmp_path, facts)
    assert card.data.license_name == "my-licence" and card.data.to_dict()["license_link"] == "LICENSE.md"
    assert "- These weights: [my-licence](LICENSE.md)." in text


@pytest.mark.parametrize(
    ("method", "tags"),
    [
        ("repa", ["representation-alignment", "repa"]),
        ("irepa+srepa", ["representation-alignment", "irepa", "srepa"]),
        ("structure-kl", ["representation-alignment", "srepa"]),
    ],
)
def test_method_tags(tmp_path: Path, method: str, tags: list[str]) -> None:
    card, _ = card_of(tmp_path, replace(FACTS, method=method))
    assert card.data.tags is not None and card.data.tags[4:] == tags


def test_example_label_is_a_name_only_if_it_names_one_class(tmp_path: Path) -> None:
    labels = {
        r'class_labels=["a \"b\" c"]': {"0": 'a "b" c, d'},
        "class_labels=[0]": {0: "crane", 1: "crane, bird"},
        'class_labels=["0"]': {index: str(index) for index in range(12)},
    }
    for expected, id2label in labels.items():
        _, text = card_of(tmp_path, replace(FACTS, id2label=id2label))
        assert expected in text
    assert "9: 9; and 2 more." in text


def test_unruly_class_names_do_not_break_the_card(tmp_path: Path) -> None:
    card, text = card_of(tmp_path, replace(FACTS, id2label={0: "a\n---\nlicense: mit", 1: "<b>|c"}))
    assert card.data.license == "cc-by-nc-4.0"
    assert "1: &lt;b>\\|" in text


def test_sample_grid_is_brought_into_the_folder(tmp_path: Path) -> None:
    grid = tmp_path / "validation" / "grid.png"
    grid.parent.mkdir()
    Image.new("RGB", (4, 4), "red").save(grid)
    _, text = card_of(tmp_path / "out", replace(FACTS, sample_grid=grid))
    assert "](sample_grid.png)" in text
    assert (tmp_path / "out" / "sample_grid.png").read_bytes() == grid.read_bytes()
    # Written again from its own copy, and without a picture.
    card_of(tmp_path / "out", replace(FACTS, sample_grid=tmp_path / "out" / "sample_grid.png"))
    _, text = card_of(tmp_path / "out", replace(FACTS, sample_grid=tmp_path / "gone.png"))
    assert "sample_grid.png" not in text


def test_the_loading_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = SiTTransformer2DModel(
        sample_size=4, in_channels=3, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=2
    )
    labels = {"0": "zero, naught", "1": "one"}
    pipeline = SiTPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler(), id2label=labels)
    pipeline.save_pretrained(tmp_path)
    facts = replace(FACTS, vae=None, hub_id=None, id2label=labels, num_classes=2, num_inference_steps=2)
    _, text = card_of(tmp_path, facts)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)  # type: ignore[union-attr]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exec(compile(code, "card", "exec"), {})
    assert Image.open("sample.png").size == (4, 4)


TWO_TEACHERS = """
model: {preset: SiT-B/2}
data: {dataset: ILSVRC/imagenet-1k}
alignment:
  preset: srepa-kl
  taps: {late: 12, attention: transformer_blocks.2.attn, same: transformer_blocks.5, unused: 1}
  terms:
    cosine: {weight: {name: hard_stop, step: 100000, value: 0.5}}
    gram_kl: {weight: {name: linear_decay, end: 200000, initial: 0.7}}
    clip: {objective: cosine, weight: [{name: warm_up, num_steps: 1000, value: 0.3}, 2], tap: late, target: clip}
    layers: {objective: layer_sync, tap: attention, projector: null, target: {tap: same}}
    zero: {objective: cosine, weight: 0, target: nobody}
    gram_mse: null
teachers:
  clip: {name_or_path: openai/clip-vit-large-patch14}
  nobody: {name_or_path: me/nobody}
"""


def facts_of(tmp_path: Path, text: str, *options: str, **facts: Any) -> tuple[TrainingConfig, ModelCardFacts]:
    (tmp_path / "run.yaml").write_text(text)
    config = load_training_config(["--config", str(tmp_path / "run.yaml"), *options], validate=False)
    with torch.device("meta"):
        transformer = SiTTransformer2DModel.from_preset(config.model.preset, num_classes=10)
    return config, facts_from_config(config, transformer, **alignment_facts(config, transformer), **facts)


def test_a_card_names_every_teacher_tap_and_schedule(tmp_path: Path) -> None:
    config, facts = facts_of(tmp_path, TWO_TEACHERS)
    card, text = card_of(tmp_path / "out", facts, config.to_dict())
    dino = "[facebook/dinov2-base](https://huggingface.co/facebook/dinov2-base)"
    clip = "[openai/clip-vit-large-patch14](https://huggingface.co/openai/clip-vit-large-patch14)"
    for statement in (
        f"aligned with the features of {dino} and {clip} (preset `srepa-kl`)",
        f"| Teacher | {dino} |\n| Teacher `clip` | {clip} |\n",
        "| Aligned block | 4 (counted from 1) |",
        "| Aligned block `late` | 12 (counted from 1) |",
        "| Aligned block `same` | 6 (counted from 1) |",
        "| Aligned module `attention` | `transformer_blocks.2.attn` |",
        "| Weight of `cosine` | 0.5 until step 100,000, then 0 |",
        "| Weight of `gram_kl` | 0.7 to 0.0 along a straight line from step 0 to 200,000 |",
        "| Weight of `clip` | (rising to 0.3 over 1,000 steps) times (2.0) |",
        "| Objective of `gram_kl` | gram_kl (tau_teacher 0.2, tau_student 0.2) |",
        "| Steps | 400,000 |",
        f"check the licence of {dino} (Apache-2.0 by its card).",
        f"check the licence of {clip}.",
        "non-commercial research and education only",
    ):
        assert statement in text, statement
    table = text.split("<details>")[0]
    assert "nobody" not in table and "`unused`" not in table and "`zero`" not in table and "gram_mse" not in table
    assert card.data.datasets == ["ILSVRC/imagenet-1k"]


def test_a_term_that_has_stopped_keeps_its_block_and_teacher_on_the_card(tmp_path: Path) -> None:
    stop = "{name: hard_stop, step: 2, value: 0.5}"
    text = f"alignment: {{preset: repa, depth: 3, terms: {{cosine: {{weight: {stop}}}}}}}"
    _, facts = facts_of(tmp_path, text, "--model.preset", "SiT-S/8", "--training.max_steps", "4", steps=4)
    assert (facts.depth, facts.teacher, facts.steps) == (3, "facebook/dinov2-base", 4)
    assert facts.terms == {"cosine": "0.5 until step 2, then 0"}


def test_facts_of_other_methods(tmp_path: Path) -> None:
    _, facts = facts_of(tmp_path, "alignment: {preset: sit}", "--model.preset", "SiT-B/4")
    assert (facts.teacher, facts.depth, facts.terms, facts.objectives) == (None, None, {}, [])
    assert (facts.model_name, facts.num_classes) == ("SiT-B/4", 10) and "Projector" not in facts.settings
    options = ["--alignment.preset", "reg", "--alignment.terms.cosine", "null", "--model.num_layers", "3"]
    _, facts = facts_of(tmp_path, "model: {preset: SiT-S/8}", *options)
    assert (facts.teacher, facts.depth) == ("facebook/dinov2-base", None)
    assert facts.settings["Weight of the class token's flow loss"] == "0.03"
    assert facts.model_name == "SiT of a size of its own"
    _, facts = facts_of(tmp_path, "alignment: {preset: irepa, tap: pos_embed}", "--model.preset", "SiT-L/8")
    assert facts.depth == "pos_embed" and facts.settings["Projector"] == "conv (kernel_size 3)"
    assert facts.settings["Teacher tokens"] == "spatial_norm (alpha 0.6)"
    options = ["--optimizer.lr_schedule", "cosine", "--optimizer.lr_warmup_steps", "2000", "--optimizer.max_grad_norm"]
    _, facts = facts_of(tmp_path, "model: {preset: SiT-S/8, init_from: me/sit}", *options, "0")
    assert facts.settings["Optimizer"].endswith("learning rate cosine after 2,000 steps of warm-up")
    assert facts.settings["Gradient norm"] == "not clipped"
    assert (facts.model_name, facts.init_from, facts.hub_id) == ("SiT", "me/sit", None)


def test_known_terms_are_told_apart() -> None:
    assert licence_note("facebook/dinov2-large") == licence_note("facebook/dinov2-with-registers-base")
    assert "DINOv3 License" in str(licence_note("facebook/dinov3-vitb16-pretrain-lvd1689m"))
    assert "not for commercial use" in str(licence_note("nyu-visionx/moco-v3-vit-b"))
    assert "MIT" in str(licence_note("stabilityai/sd-vae-ft-ema"))
    assert licence_note("me/dinov2-base") is licence_note("facebook/dinov2-base-mine") is licence_note(None) is None


def test_the_dinov3_licence_is_on_the_card_of_its_student(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, replace(FACTS, teacher="facebook/dinov3-vitb16-pretrain-lvd1689m"))
    assert "under the [DINOv3 License](https://ai.meta.com/" in text and "Apache-2.0" not in text


def test_bare_folder_names_are_local_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "imagefolder").mkdir()
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    shown = public_config(
        {
            "data": {"dataset": "digits", "split": "train"},
            "teachers": {"second": {"name_or_path": "digits"}},
            "latents": {"vae": "pixels"},
        }
    )
    assert shown["data"] == {"dataset": "(local)", "split": "train"}
    assert shown["teachers"] == {"second": {"name_or_path": "(local)"}} and shown["latents"] == {"vae": "pixels"}
    assert public_config({"dataset": "imagefolder"}) == {"dataset": "imagefolder"}


def test_published_files_hold_no_local_path(tmp_path: Path) -> None:
    run = tmp_path / "run"
    files = {
        "vae/config.json": {"_name_or_path": str(tmp_path / "vae"), "sample_size": 32},
        "transformer/config.json": {"_name_or_path": "me/sit", "sample_size": 4},
        "projectors/default/config.json": {"in_dim": 8},
        "scheduler/scheduler_config.json": {"path_type": "linear"},
    }
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))
    config = TrainingConfig(output_dir=str(run))
    config.data.dataset = str(tmp_path / "images")
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    versions = public_versions(run, [*files, "config.yaml"])
    assert set(versions) == {"vae/config.json", "config.yaml"}
    assert json.loads(versions["vae/config.json"]) == {"sample_size": 32}
    published = yaml.safe_load(versions["config.yaml"])
    assert published["output_dir"] == published["data"]["dataset"] == "(local)"
    assert published["teacher"] == config.to_dict()["teacher"]
    assert str(tmp_path) in (run / "config.yaml").read_text()
