"""Whole runs in one process, with tiny real parts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.tiny_run import write_clip


def _train(assets: Path, output_dir: Path, *options: str) -> Trainer:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir), *options]
    trainer = Trainer(load_training_config(arguments))
    trainer.train()
    return trainer


def _metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_a_run_leaves_a_pipeline_that_gives_the_validation_s_images(assets: Path, tmp_path: Path) -> None:
    _train(assets, tmp_path, "--validation.every", "2")
    for name in ("model_index.json", "README.md", "config.yaml", "projectors/default/config.json", "checkpoint-4"):
        assert (tmp_path / name).exists(), name
    records = _metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {"loss", "flow", "alignment/cosine", "alignment/gram_mse", "lr", "images_per_second"} <= set(records[0])
    total = records[0]["flow"] + records[0]["alignment/cosine"] + 2 * records[0]["alignment/gram_mse"]
    assert records[0]["loss"] == pytest.approx(total, rel=1e-5)

    pipeline = SiTPipeline.from_pretrained(tmp_path)
    assert pipeline.config.id2label == {"0": "cat", "1": "dog", "2": "newt"}
    settings = json.loads((tmp_path / "validation" / "step-4" / "settings.json").read_text())
    images = pipeline(
        class_labels=[record["class_label"] for record in settings["images"]],
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance_scale"],
        generator=[torch.Generator().manual_seed(record["seed"]) for record in settings["images"]],
    ).images
    for image, record in zip(images, settings["images"], strict=True):
        written = Image.open(tmp_path / "validation" / "step-4" / record["file"])
        assert np.array_equal(np.asarray(image), np.asarray(written))


def test_the_pipeline_has_the_averaged_weights_and_the_checkpoint_both(assets: Path, tmp_path: Path) -> None:
    _train(assets, tmp_path)
    final = _weights(tmp_path / "transformer")
    average = _weights(tmp_path / "checkpoint-4" / "transformer")
    raw = load_file(tmp_path / "checkpoint-4" / "raw.safetensors")
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(final[name], average[name])
    assert not torch.equal(final[name], raw[f"student.transformer.{name}"])
    projector = _weights(tmp_path / "projectors" / "default")
    key = next(iter(projector))
    assert torch.equal(projector[key], _weights(tmp_path / "checkpoint-4" / "projectors" / "default")[key])
    assert not torch.equal(projector[key], raw[f"student.projectors.default.{key}"])


def test_training_lowers_the_loss(assets: Path, tmp_path: Path) -> None:
    _train(assets, tmp_path, "--training.max_steps", "40", "--checkpoints.every", "1000", "--optimizer.lr", "3e-3")
    losses = [record["loss"] for record in _metrics(tmp_path)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def test_stopping_and_resuming_changes_nothing(assets: Path, tmp_path: Path) -> None:
    _train(assets, tmp_path / "whole", "--training.max_steps", "6")
    _train(assets, tmp_path / "halves", "--training.max_steps", "3", "--checkpoints.every", "3")
    trainer = _train(assets, tmp_path / "halves", "--training.max_steps", "6", "--resume_from_checkpoint", "latest")
    assert trainer.step == 6
    for part in ("transformer", "projectors/default", "checkpoint-6/transformer"):
        whole, halves = _weights(tmp_path / "whole" / part), _weights(tmp_path / "halves" / part)
        assert all(torch.equal(whole[name], halves[name]) for name in whole), part
    for file in ("optimizer_student.safetensors", "raw.safetensors"):
        whole_state, halves_state = (
            load_file(tmp_path / name / "checkpoint-6" / file) for name in ("whole", "halves")
        )
        assert whole_state.keys() == halves_state.keys()
        assert all(torch.equal(whole_state[name], halves_state[name]) for name in whole_state)
    losses = [[record["loss"] for record in _metrics(tmp_path / name)] for name in ("whole", "halves")]
    assert losses[0] == losses[1]


def test_accumulation_gives_the_same_trajectory(assets: Path, tmp_path: Path) -> None:
    _train(assets, tmp_path / "whole")
    _train(assets, tmp_path / "parts", "--training.micro_batch_size", "2")
    for one, other in zip(_metrics(tmp_path / "whole"), _metrics(tmp_path / "parts"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["alignment/gram_mse"] == pytest.approx(other["alignment/gram_mse"], rel=1e-3)


def test_after_a_hard_stop_the_projector_rests_and_the_teacher_is_gone(assets: Path, tmp_path: Path) -> None:
    stop = "{name: hard_stop, step: 2}"
    options = [
        "--alignment.terms.cosine.weight",
        stop,
        "--alignment.terms.gram_mse",
        "null",
        "--checkpoints.every",
        "1",
    ]
    trainer = _train(assets, tmp_path, *options)
    assert trainer.method.teachers == {}
    name = "student.projectors.default.layers.0.weight"
    projectors = [load_file(tmp_path / f"checkpoint-{step}" / "raw.safetensors")[name] for step in (1, 2, 3, 4)]
    assert not torch.equal(projectors[0], projectors[1]) and torch.equal(projectors[1], projectors[3])
    averages = [
        _weights(tmp_path / f"checkpoint-{step}" / "projectors" / "default")["layers.0.weight"] for step in (2, 4)
    ]
    assert torch.equal(averages[0], averages[1])
    records = _metrics(tmp_path)
    assert [record["weight/cosine"] for record in records] == [1.0, 1.0, 0.0, 0.0]
    assert "alignment/cosine" in records[1] and "alignment/cosine" not in records[2]
    resumed = _train(assets, tmp_path, *options, "--training.max_steps", "5", "--resume_from_checkpoint", "latest")
    assert resumed.method.teachers == {} and len(_metrics(tmp_path)) == 5


def test_another_seed_is_another_run(assets: Path, tmp_path: Path) -> None:
    _train(assets, tmp_path / "zero", "--training.max_steps", "1")
    _train(assets, tmp_path / "one", "--training.max_steps", "1", "--seed", "1")
    assert _metrics(tmp_path / "zero")[0]["flow"] != _metrics(tmp_path / "one")[0]["flow"]


@pytest.mark.parametrize("preset", ["sit", "repa", "irepa", "srepa-kl", "structure-mse", "reg+srepa"])
def test_every_kind_of_preset_trains(assets: Path, tmp_path: Path, preset: str) -> None:
    options = ["--alignment.preset", preset, "--training.max_steps", "2", "--validation.every", "2"]
    if preset.startswith("irepa"):
        options += ["--config", str(_conv_projector(tmp_path))]
    _train(assets, tmp_path / "run", *options)
    assert all(np.isfinite(record["loss"]) for record in _metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "projectors").exists() == (preset != "sit")
    assert SiTPipeline.from_pretrained(tmp_path / "run")(class_labels="dog", num_inference_steps=2).images


def _conv_projector(folder: Path) -> Path:
    # The assets' configuration shrinks the MLP projector; iREPA's has no hidden width.
    (folder / "conv.yaml").write_text("alignment: {projector: {name: conv}}\n")
    return folder / "conv.yaml"


def test_bf16_trains_with_float32_weights_and_losses(assets: Path, tmp_path: Path) -> None:
    trainer = _train(assets, tmp_path, "--training.mixed_precision", "bf16", "--training.max_steps", "2")
    assert {parameter.dtype for parameter in trainer.modules["student"].parameters()} == {torch.float32}
    assert all(np.isfinite(record["loss"]) for record in _metrics(tmp_path))


def test_pixels_and_unlabelled_images_train(assets: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index, file in enumerate(sorted((assets / "images").rglob("*.png"))):
        (images / f"{index}.png").write_bytes(file.read_bytes())
    options = ["--data.dataset", str(images), "--latents.vae", "pixels", "--model.patch_size", "4"]
    trainer = _train(assets, tmp_path / "run", *options, "--training.max_steps", "2")
    assert trainer.method.transformer.config.num_classes == 1
    pipeline = SiTPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.vae is None
    assert pipeline(class_labels=0, num_inference_steps=2).images[0].size == (16, 16)


def test_a_stream_trains(assets: Path, tmp_path: Path) -> None:
    _train(assets, tmp_path, "--data.streaming", "--model.num_classes", "3", "--training.max_steps", "2")
    assert len(_metrics(tmp_path)) == 2


def test_several_teachers_depths_and_projectors_train_together(assets: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    (tmp_path / "many.yaml").write_text(
        yaml.safe_dump(
            {
                "teachers": {"clip": {"name_or_path": str(tmp_path / "clip")}},
                "alignment": {
                    "taps": {"late": 3, "embedding": "patch_embed"},
                    "projectors": {"clip": {"name": "linear"}},
                    "terms": {
                        "clip": {
                            "objective": "cosine",
                            "weight": 0.5,
                            "tap": "late",
                            "target": "clip",
                            "projector": "clip",
                        },
                    },
                },
            }
        )
    )
    trainer = _train(assets, tmp_path / "run", "--config", str(tmp_path / "many.yaml"), "--training.max_steps", "2")
    assert set(trainer.method.teachers) == {"default", "clip"}
    assert {path.name for path in (tmp_path / "run" / "projectors").iterdir()} == {"default", "clip"}
    assert set(trainer.modules["student"].features) == {("default", "default"), ("late", "clip")}
    record = _metrics(tmp_path / "run")[-1]
    parts = record["flow"] + record["alignment/cosine"] + 2 * record["alignment/gram_mse"]
    assert record["loss"] == pytest.approx(parts + 0.5 * record["alignment/clip"], rel=1e-5)
