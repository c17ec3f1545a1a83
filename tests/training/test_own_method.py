"""A method and a transformer of somebody else's, and callbacks: the trainer takes them as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from safetensors.torch import load_file

from diffusers_srepa import (
    ConfigurationError,
    SiTPipeline,
    Trainer,
    TrainerCallback,
    load_training_config,
    register_transformer,
)
from diffusers_srepa.configuration.command_line import load_config
from diffusers_srepa.models import presets
from diffusers_srepa.models.loading import read_weights
from tests.helpers.toy_method import CriticConfig, CriticMethod, ToyTransformer


ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
OWN = ["--latents.vae", "pixels", "--sampling.guidance_scale", "1"]


@pytest.fixture
def critic_options(assets: Path, tmp_path: Path) -> list[str]:
    """Options of a method that has neither teacher nor alignment."""
    (tmp_path / "own.yaml").write_text(
        f"data: {{dataset: {assets / 'images'}, resolution: 16, num_workers: 0}}\n"
        "latents: {vae: pixels}\noptimizer: {lr: 0.01}\n"
        "training: {max_steps: 4, global_batch_size: 8, mixed_precision: 'no', ema_decay: 0.5, log_every: 1}\n"
        "sampling: {num_inference_steps: 2}\nvalidation: {every: 4, num_images: 2}\ncheckpoints: {every: 2}\n"
        "tracking: {report_to: none}\ncritic_weight: 0.2\n"
    )
    return ["--config", str(tmp_path / "own.yaml")]


def train_critic(options: list[str], output_dir: Path, *more: str) -> Trainer:
    config = load_config([*options, "--output_dir", str(output_dir), *more], CriticConfig)
    torch.manual_seed(config.seed)
    trainer = Trainer(config, method=CriticMethod(config))
    trainer.train()
    return trainer


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {
        f"{file.relative_to(checkpoint)}/{name}": value for file in files for name, value in load_file(file).items()
    }


def test_a_method_of_two_phases_and_three_modules_trains_and_exports(
    critic_options: list[str], tmp_path: Path
) -> None:
    trainer = train_critic(critic_options, tmp_path / "run")
    records = metrics(tmp_path / "run")
    for record in records:
        assert record["loss/generator"] == pytest.approx(record["flow"] + 0.2 * record["verdict"], rel=1e-5)
        assert record["loss/critic"] == record["critic"]
        assert record["loss"] == pytest.approx(record["loss/generator"] + record["loss/critic"], rel=1e-6)
        assert record["weight/verdict"] == 0.2 and record["lr"] == 0.01 and record["lr/critic"] == 0.005
    assert records[-1]["critic"] < records[0]["critic"]
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert {path.name for path in checkpoint.iterdir() if path.is_dir()} == {
        "transformer",
        "gain",
        "critic",
        "scheduler",
    }
    assert load_file(checkpoint / "gain" / "model.safetensors").keys() == {"factor"}
    pipeline = SiTPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline.transformer) is ToyTransformer
    average = trainer.ema.averages["transformer.head.weight"]
    assert torch.equal(pipeline.transformer.head.weight, average)
    assert (tmp_path / "run" / "critic" / "model.safetensors").exists()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "CriticMethod" in card and "verdict" in card
    raw, name = load_file(checkpoint / "raw.safetensors"), "head.weight"
    assert torch.equal(read_weights(checkpoint, "transformer", raw=True)[name], raw[f"transformer.{name}"])
    assert torch.equal(read_weights(checkpoint, "transformer")[name], average)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    for folder in (tmp_path / "run", checkpoint):
        images = SiTPipeline.from_pretrained(folder)([0, 1], num_inference_steps=2, generator=generators).images
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        for index, image in enumerate(images):
            written = Image.open(tmp_path / "run" / "validation" / "step-4" / f"{index:04d}.png")
            assert image.tobytes() == written.tobytes()


def test_a_phase_leaves_no_gradient_in_the_modules_of_others(critic_options: list[str], tmp_path: Path) -> None:
    config = load_config([*critic_options, "--output_dir", str(tmp_path / "run")], CriticConfig)
    trainer = Trainer(config, method=CriticMethod(config))
    before = {name: value.clone() for name, value in trainer.modules["critic"].state_dict().items()}
    batch = next(trainer._batches())
    generator = trainer.method.phases[1]
    with trainer.training._context(generator, 0) as context:
        generator.loss(batch, context).loss.backward()
    assert all(parameter.grad is None for parameter in trainer.modules["critic"].parameters())
    assert all(parameter.requires_grad for parameter in trainer.modules["critic"].parameters())
    assert all(parameter.grad is not None for parameter in trainer.modules["gain"].parameters())
    assert all(torch.equal(value, before[name]) for name, value in trainer.modules["critic"].state_dict().items())
    trainer.lock.release()


@pytest.mark.parametrize("micro", ["8", "2"])
def test_a_method_of_one_s_own_resumes_bit_for_bit(critic_options: list[str], tmp_path: Path, micro: str) -> None:
    options = [*critic_options, "--training.micro_batch_size", micro]
    train_critic(options, tmp_path / "whole")
    train_critic(options, tmp_path / "halves", "--training.max_steps", "2")
    train_critic(options, tmp_path / "halves", "--resume_from_checkpoint", "latest")
    whole, halves = (tensors(tmp_path / name / "checkpoint-4") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and any("optimizer_critic" in name for name in whole)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_another_method_s_checkpoint_is_refused(assets: Path, critic_options: list[str], tmp_path: Path) -> None:
    train_critic(critic_options, tmp_path / "critic")
    config = load_config([*critic_options, "--output_dir", str(tmp_path / "new")], CriticConfig)
    config.resume_from_checkpoint = str(tmp_path / "critic" / "checkpoint-2")

    class OnePhase(CriticMethod):
        def __init__(self, config: CriticConfig) -> None:
            super().__init__(config)
            self.phases = (replace(self.phases[1], modules=("transformer", "gain", "critic")),)

    with pytest.raises(ConfigurationError, match="method was CriticMethod and is OnePhase"):
        Trainer(config, method=OnePhase(config))
    config.resume_with_changes = True
    with pytest.raises(ConfigurationError, match="it has the phases critic, generator, but the method has generator"):
        Trainer(config, method=OnePhase(config))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["--multi_gpu", "--use_fsdp"])
def test_two_processes_give_the_trajectory_of_one(critic_options: list[str], tmp_path: Path, kind: str) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    train_critic(critic_options, tmp_path / "one")
    for more in (["--training.max_steps", "2"], ["--resume_from_checkpoint", "latest"]):
        script = ["-m", "tests.helpers.toy_method", *critic_options, "--output_dir", str(tmp_path / "two")]
        launcher = [*TWO_PROCESSES, kind, *(["--fsdp_version", "2"] if kind == "--use_fsdp" else [])]
        command = [*launcher, *script, "--expected_processes", "2", *more]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss/critic", "loss/generator", "grad_norm/critic"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)
    one, two = (tensors(tmp_path / name / "checkpoint-4") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-4)


def test_names_that_are_paths_and_unknown_modules_are_refused(critic_options: list[str], tmp_path: Path) -> None:
    config = load_config([*critic_options, "--output_dir", str(tmp_path / "run")], CriticConfig)

    class Climbing(CriticMethod):
        def prepare(self, dataset: Any) -> None:
            super().prepare(dataset)
            self.modules["../gain"] = self.modules.pop("gain")

    with pytest.raises(ConfigurationError, match="must be a plain name"):
        Trainer(config, method=Climbing(config))

    class Short(CriticMethod):
        def prepare(self, dataset: Any) -> None:
            super().prepare(dataset)
            del self.modules["gain"]

    with pytest.raises(ConfigurationError, match="every module needs a phase, and every phase modules"):
        Trainer(config, method=Short(config))

    class Twins(CriticMethod):
        def __init__(self, config: CriticConfig) -> None:
            super().__init__(config)
            self.phases = (self.phases[0], replace(self.phases[1], name="critic"))

    with pytest.raises(ConfigurationError, match="phases of different names|of different names"):
        Trainer(config, method=Twins(config))

    class InTheWay(CriticMethod):
        def prepare(self, dataset: Any) -> None:
            super().prepare(dataset)
            self.modules["validation"] = self.modules.pop("gain")
            self.phases = (self.phases[0], replace(self.phases[1], modules=("transformer", "validation")))

    with pytest.raises(ConfigurationError, match="into the folder 'validation', which is another part's or the run's"):
        Trainer(config, method=InTheWay(config))

    class Forgetful(CriticMethod):
        def prepare(self, dataset: Any) -> None:
            super().prepare(dataset)
            gain = self.modules["gain"]
            gain.saved_parts = lambda: {}

    with pytest.raises(ConfigurationError, match="'factor' of the module 'gain' is in none of its saved_parts"):
        Trainer(config, method=Forgetful(config))
    with pytest.raises(ConfigurationError, match="method and transformer are both given"):
        Trainer(config, method=CriticMethod(config), transformer=ToyTransformer())
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ a transformer


def aligned_config(assets: Path, output_dir: Path, *options: str) -> Any:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir)]
    return load_training_config([*arguments, "--sampling.guidance_scale", "1", "--validation.every", "4", *options])


def check_aligned_run(trainer: Trainer, folder: Path) -> None:
    assert trainer.method.student.taps["default"].path == "blocks.0"
    assert metrics(folder)[-1]["alignment/gram_mse"] > 0
    assert type(SiTPipeline.from_pretrained(folder).transformer) is ToyTransformer
    assert type(SiTPipeline.from_pretrained(folder / "checkpoint-4").transformer) is ToyTransformer
    assert "ToyTransformer" in (folder / "README.md").read_text() or "Toy-S/2" in (folder / "README.md").read_text()


def test_a_transformer_that_is_no_sit_is_aligned_as_an_object(assets: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = Trainer(aligned_config(assets, folder), transformer=ToyTransformer(sample_size=8, num_classes=3))
    trainer.train()
    check_aligned_run(trainer, folder)
    resumed = aligned_config(assets, folder, "--training.max_steps", "5", "--resume_from_checkpoint", "latest")
    Trainer(resumed, transformer=ToyTransformer(sample_size=8, num_classes=3)).train()
    with pytest.raises(ConfigurationError, match="the given transformer has num_classes 7, but this run needs 3"):
        Trainer(aligned_config(assets, tmp_path / "new"), transformer=ToyTransformer(sample_size=8, num_classes=7))


def test_a_registered_transformer_is_chosen_and_continued_by_name(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "_TRANSFORMERS", dict(presets._TRANSFORMERS))
    register_transformer(ToyTransformer)
    (tmp_path / "toy.yaml").write_text(
        "model: {preset: Toy-S/2, num_layers: null, num_attention_heads: null, attention_head_dim: null}\n"
    )
    options = ["--config", str(tmp_path / "toy.yaml")]
    trainer = Trainer(aligned_config(assets, tmp_path / "run", *options))
    trainer.train()
    check_aligned_run(trainer, tmp_path / "run")
    for source in ("run", "run/checkpoint-4"):
        config = aligned_config(assets, tmp_path / "next", *options, "--model.init_from", str(tmp_path / source))
        config.overwrite_output_dir = True
        following = Trainer(config)
        name = "transformer.head.weight"
        start, end = following.modules["student"].state_dict()[name], trainer.ema.averages[f"student.{name}"]
        assert torch.equal(start, end)
        following.train()


def test_compiled_blocks_are_the_transformer_s_and_the_taps_are_on_them(assets: Path, tmp_path: Path) -> None:
    trainer = Trainer(aligned_config(assets, tmp_path, "--model.compile"))
    blocks = trainer.method.transformer.transformer_blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert blocks[0]._forward_hooks and not blocks[1]._forward_hooks
    trainer.lock.release()


# --------------------------------------------------------------------- callbacks


class Recorder(TrainerCallback):
    """Keeps what it is told, stops at a step, and adds a number."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list[Any] = []
        self.stop_at = stop_at

    def on_step_end(self, trainer: Any, step: int, values: Mapping[str, torch.Tensor] | None) -> None:
        assert values is not None and values["loss"].isfinite()
        self.calls.append(("step", step))
        trainer.add_metrics({"twice": 2 * step})
        if step == self.stop_at:
            trainer.stop("it is good enough")

    def on_checkpoint(self, trainer: Any, step: int, folder: Path) -> None:
        self.calls.append(("checkpoint", step))
        assert (folder / "manifest.json").exists()

    def on_validation(self, trainer: Any, step: int, images: list[Image.Image]) -> None:
        self.calls.append(("validation", step, len(images)))
        trainer.add_metrics({"images": len(images)})

    def on_train_end(self, trainer: Any, step: int) -> None:
        self.calls.append(("end", step))
        assert (trainer.output_dir / "model_index.json").exists()


def test_callbacks_are_called_at_their_points_and_add_metrics(assets: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    Trainer(aligned_config(assets, tmp_path, "--validation.every", "2"), callbacks=[recorder]).train()
    expected = [("step", 1), ("step", 2), ("checkpoint", 2), ("validation", 2, 4)]
    expected += [("step", 3), ("step", 4), ("checkpoint", 4), ("validation", 4, 4), ("end", 4)]
    assert recorder.calls == expected
    records = metrics(tmp_path)
    assert [record["twice"] for record in records] == [2, 4, 6, 8]
    # The images of step 2 were there only after its values had been logged.
    assert ["images" in record for record in records] == [False, False, True, False]


def test_what_a_callback_raises_is_not_taken_for_a_full_disk(assets: Path, tmp_path: Path) -> None:
    class Refused(TrainerCallback):
        def on_step_end(self, trainer: Any, step: int, values: Any) -> None:
            raise ConnectionError("nobody listens")

    with pytest.raises(ConnectionError, match="^nobody listens$"):
        Trainer(aligned_config(assets, tmp_path), callbacks=[Refused()]).train()


def test_a_dataset_that_says_too_little_is_refused(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the dataset is a list without num_classes, id2label, fingerprint"):
        Trainer(aligned_config(assets, tmp_path / "run"), dataset=[{}] * 8)


def test_a_callback_ends_a_run_in_good_order_and_it_can_go_on(assets: Path, tmp_path: Path) -> None:
    config = aligned_config(assets, tmp_path, "--training.log_every", "2")
    recorder = Recorder(stop_at=3)
    assert Trainer(config, callbacks=[recorder]).train() == tmp_path
    assert recorder.calls[-3:] == [("validation", 3, 4), ("checkpoint", 3), ("end", 3)]
    assert metrics(tmp_path)[-1]["step"] == 3 and metrics(tmp_path)[-1]["twice"] == 6
    assert (tmp_path / "checkpoint-3").is_dir() and not (tmp_path / "checkpoint-4").exists()
    SiTPipeline.from_pretrained(tmp_path)
    config.resume_from_checkpoint = "latest"
    Trainer(config).train()
    assert [record["step"] for record in metrics(tmp_path)] == [2, 3, 4]


def test_a_dataset_object_of_the_datasets_library_is_trained_on(assets: Path, tmp_path: Path) -> None:
    images = load_dataset("imagefolder", data_dir=str(assets / "images"), split="train")
    config = aligned_config(assets, tmp_path / "object")
    config.data.dataset = None
    trainer = Trainer(config, dataset=images.shuffle(seed=1))
    trainer.train()
    assert len(trainer.dataset) == 24 and trainer.method.id2label == {0: "cat", 1: "dog", 2: "newt"}
    assert "a local dataset" in (tmp_path / "object" / "README.md").read_text()
