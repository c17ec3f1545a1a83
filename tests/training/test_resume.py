"""Resuming: only the same run goes on, and what it leaves behind stays coherent."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.trainer import Trainer


def _trainer(assets: Path, output_dir: Path, *options: str) -> Trainer:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir), *options]
    return Trainer(load_training_config(arguments))


def test_changed_options_are_listed_and_refused_unless_allowed(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path, "--training.max_steps", "2").train()
    again = ["--resume_from_checkpoint", "latest", "--training.max_steps", "3"]
    changes = ["--optimizer.lr", "0.5", "--flow.path", "cosine", "--alignment.terms.cosine", "null"]
    with pytest.raises(ConfigurationError) as error:
        _trainer(assets, tmp_path, *again, *changes)
    for option in (
        "optimizer.lr was 0.001 and is 0.5",
        "flow.path was linear and is cosine",
        "alignment.terms.cosine",
    ):
        assert option in str(error.value)
    trainer = _trainer(assets, tmp_path, *again, "--optimizer.lr", "0.5", "--resume_with_changes")
    assert trainer.training.optimizers["student"].optimizer.param_groups[0]["lr"] == 0.5 and trainer.step == 2


def test_what_does_not_shape_the_training_may_change(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path, "--training.max_steps", "2").train()
    options = ["--training.max_steps", "3", "--training.micro_batch_size", "4", "--training.log_every", "3"]
    _trainer(assets, tmp_path, "--resume_from_checkpoint", "latest", *options, "--data.num_workers", "1").train()
    assert (tmp_path / "checkpoint-3").is_dir()


def test_another_seed_or_batch_is_another_run(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path, "--training.max_steps", "2").train()
    with pytest.raises(ConfigurationError, match="seed was 0 and is 1"):
        _trainer(assets, tmp_path, "--resume_from_checkpoint", "latest", "--seed", "1", "--resume_with_changes")


def test_going_back_sets_the_later_checkpoints_aside(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path, "--training.max_steps", "6", "--checkpoints.total_limit", "3").train()
    options = ["--training.max_steps", "3", "--checkpoints.every", "1", "--checkpoints.total_limit", "2"]
    _trainer(assets, tmp_path, "--resume_from_checkpoint", "checkpoint-2", *options).train()
    names = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert names == ["abandoned-checkpoint-4", "abandoned-checkpoint-6", "checkpoint-2", "checkpoint-3"]


def test_fewer_steps_than_made_are_refused(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path, "--training.max_steps", "2").train()
    with pytest.raises(ConfigurationError, match="is at step 2, but training.max_steps is 1"):
        _trainer(assets, tmp_path, "--resume_from_checkpoint", "latest", "--training.max_steps", "1")


def test_a_schedule_goes_on_where_it_was(assets: Path, tmp_path: Path) -> None:
    options = ["--optimizer.lr_schedule", "constant_with_warmup", "--optimizer.lr_warmup_steps", "4"]
    _trainer(assets, tmp_path / "whole", *options).train()
    _trainer(assets, tmp_path / "halves", *options, "--training.max_steps", "2").train()
    _trainer(assets, tmp_path / "halves", *options, "--resume_from_checkpoint", "latest").train()
    rates = []
    for name in ("whole", "halves"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rates.append([json.loads(line)["lr"] for line in lines])
    assert rates[0] == rates[1] == pytest.approx([0.00025, 0.0005, 0.00075, 0.001])


def test_training_goes_on_from_a_finished_pipeline_also_at_another_size(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path / "small", "--training.max_steps", "2").train()
    start = ["--model.init_from", str(tmp_path / "small")]
    trainer = _trainer(assets, tmp_path / "same", *start)
    saved = load_file(tmp_path / "small" / "projectors" / "default" / "diffusion_pytorch_model.safetensors")
    state = trainer.modules["student"].projectors["default"].state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    larger = ["--data.resolution", "32", "--training.max_steps", "1", "--validation.every", "1"]
    trainer = _trainer(assets, tmp_path / "large", *start, *larger)
    weights = load_file(tmp_path / "small" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(trainer.method.transformer.proj_out.weight, weights["proj_out.weight"])
    trainer.train()
    assert Image.open(tmp_path / "large" / "validation" / "step-1" / "0000.png").size == (32, 32)
    with pytest.raises(ConfigurationError, match="has num_layers 3, but this run needs 5"):
        _trainer(assets, tmp_path / "other", *start, "--model.num_layers", "5")


def test_without_class_dropout_there_is_no_mask_and_no_guidance(assets: Path, tmp_path: Path) -> None:
    options = ["--model.class_dropout_prob", "0", "--training.max_steps", "1"]
    with pytest.raises(ConfigurationError, match="section sampling cannot be used"):
        _trainer(assets, tmp_path / "run", *options)
    _trainer(assets, tmp_path / "run", *options, "--sampling.guidance_scale", "1").train()


def test_a_loss_that_is_not_a_number_stops_before_it_is_saved(assets: Path, tmp_path: Path) -> None:
    options = ["--optimizer.lr", "1e30", "--checkpoints.every", "1", "--training.max_steps", "8"]
    with pytest.raises(FloatingPointError, match="lower optimizer.lr"):
        _trainer(assets, tmp_path, *options).train()
    assert not (tmp_path / "model_index.json").exists()


def test_two_runs_of_different_precision_in_one_process(assets: Path, tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        options = ["--training.mixed_precision", precision, "--training.max_steps", "1"]
        trainer = _trainer(assets, tmp_path / precision, *options)
        assert trainer.accelerator.mixed_precision == precision
        trainer.train()
    with pytest.raises(ConfigurationError, match="fp16, which needs an accelerator"):
        _trainer(assets, tmp_path / "fp16", "--training.mixed_precision", "fp16")


def test_means_of_a_term_that_ends_within_an_interval_count_its_own_steps(assets: Path, tmp_path: Path) -> None:
    stop = "{name: hard_stop, step: 2}"
    options = ["--alignment.terms.cosine.weight", stop, "--alignment.terms.gram_mse", "null"]
    _trainer(assets, tmp_path / "fine", *options).train()
    _trainer(assets, tmp_path / "coarse", *options, "--training.log_every", "4").train()
    fine = [json.loads(line) for line in (tmp_path / "fine" / "metrics.jsonl").read_text().splitlines()]
    coarse = json.loads((tmp_path / "coarse" / "metrics.jsonl").read_text().splitlines()[-1])
    expected = (fine[0]["alignment/cosine"] + fine[1]["alignment/cosine"]) / 2
    assert coarse["alignment/cosine"] == pytest.approx(expected, rel=1e-5)


def test_the_average_of_a_projector_that_rests_stays(assets: Path, tmp_path: Path) -> None:
    stop = "{name: hard_stop, step: 2}"
    options = [
        "--alignment.terms.cosine.weight",
        stop,
        "--alignment.terms.gram_mse",
        "null",
        "--checkpoints.every",
        "1",
    ]
    _trainer(assets, tmp_path, *options).train()
    file, name = "projectors/default/diffusion_pytorch_model.safetensors", "layers.0.weight"
    averages = [load_file(tmp_path / f"checkpoint-{step}" / file)[name] for step in (2, 4)]
    raw = load_file(tmp_path / "checkpoint-4" / "raw.safetensors")
    assert torch.equal(averages[0], averages[1])
    assert not torch.equal(averages[1], raw[f"student.projectors.default.{name}"])
