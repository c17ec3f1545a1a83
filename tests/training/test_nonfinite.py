"""A loss that is not finite: the step is skipped and leaves no trace, and too many of them end the run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.training.method import LossOutput
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.run_losses import change_losses
from tests.helpers.tiny_run import write_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("assets"))


def _trainer(assets: Path, folder: Path, bad: dict[int, float], *options: str) -> Trainer:
    """A run whose loss is multiplied by `bad[step]` at some steps."""
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(folder), *options]
    trainer = Trainer(load_training_config(arguments))

    def spoiled(output: LossOutput, step: int) -> LossOutput:
        return replace(output, loss=output.loss * bad.get(step, 1.0))

    change_losses(trainer, spoiled)
    return trainer


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}/{name}": tensor
        for file in (checkpoint / "raw.safetensors", checkpoint / "optimizer_student.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_bad_step_changes_nothing_but_the_step(assets: Path, tmp_path: Path, factor: float) -> None:
    every = ["--checkpoints.every", "1"]
    _trainer(assets, tmp_path, {2: factor}, *every).train()
    # Step 3 was bad: there is no checkpoint of it, and step 4 went on from the weights after step 2.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 4)]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1]
    assert "loss" not in records[2] and records[2]["lr"] == records[1]["lr"]
    before, after = (_tensors(tmp_path / f"checkpoint-{step}") for step in (2, 4))
    steps = {int(after[name]) for name in after if name.endswith("/step")}
    assert steps == {3}
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_average_and_the_optimiser_are_those_of_the_step_before(assets: Path, tmp_path: Path) -> None:
    trainer = _trainer(assets, tmp_path, {1: float("nan")})
    batches = trainer._batches()
    trainer.training.run(batches, 0)
    before = {name: tensor.clone() for name, tensor in trainer.modules["student"].state_dict().items()}
    average = {name: tensor.clone() for name, tensor in trainer.ema.averages.items()}
    assert trainer.training.run(batches, 1)[0] is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.modules["student"].state_dict().items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in trainer.ema.averages.items())
    batches.close()


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(assets: Path, tmp_path: Path) -> None:
    bad = {step: float("nan") for step in range(4, 20)}
    options = ["--training.max_steps", "12", "--checkpoints.every", "2", "--training.max_skipped_steps", "3"]
    with pytest.raises(FloatingPointError) as error:
        _trainer(assets, tmp_path, bad, *options).train()
    # The weights after step 4 have given no finite loss; those after step 2 have.
    text = str(error.value)
    assert "in the last 4 step(s) up to step 8" in text and str(tmp_path / "checkpoint-2") in text
    assert "\n" not in text and not (tmp_path / "model_index.json").exists()


def test_a_bad_step_within_the_limit_is_forgotten_by_a_good_one(assets: Path, tmp_path: Path) -> None:
    bad = {step: float("inf") for step in (1, 3, 5)}
    options = ["--training.max_steps", "7", "--training.max_skipped_steps", "1"]
    _trainer(assets, tmp_path, bad, *options).train()
    assert (tmp_path / "model_index.json").exists()


def test_a_limit_of_none_ends_the_run_at_once(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="up to step 2"):
        _trainer(assets, tmp_path, {1: float("nan")}, "--training.max_skipped_steps", "0").train()


def test_old_checkpoints_go_only_when_the_newest_has_proved_good(assets: Path, tmp_path: Path) -> None:
    bad = {step: float("nan") for step in range(4, 20)}
    options = ["--training.max_steps", "12", "--checkpoints.every", "2", "--checkpoints.total_limit", "1"]
    with pytest.raises(FloatingPointError, match="checkpoint-2"):
        _trainer(assets, tmp_path, bad, *options, "--training.max_skipped_steps", "2").train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_the_number_of_skipped_steps_survives_a_resume(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path, {0: float("nan")}, "--training.max_steps", "2").train()
    trainer = _trainer(assets, tmp_path, {}, "--resume_from_checkpoint", "latest")
    assert trainer.guard.skipped_steps == 1


def test_a_checkpoint_is_not_called_good_because_a_run_goes_on_from_it(assets: Path, tmp_path: Path) -> None:
    bad = {step: float("nan") for step in range(4, 20)}
    options = ["--training.max_steps", "12", "--training.max_skipped_steps", "2"]
    for more in ([], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(FloatingPointError, match="the last good checkpoint is .*checkpoint-2:"):
            _trainer(assets, tmp_path, bad, *options, *more).train()


@pytest.mark.parametrize("has_scaler", [False, True])
def test_the_last_step_may_be_skipped_where_a_loss_scaler_skips_now_and_then(
    assets: Path, tmp_path: Path, has_scaler: bool
) -> None:
    trainer = _trainer(assets, tmp_path, {3: float("inf")})
    if has_scaler:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.accelerator.scaler = scaler
        phase = trainer.training.optimizers["student"]
        phase.optimizer = AcceleratedOptimizer(phase.optimizer.optimizer, scaler=scaler)
        trainer.train()
    else:
        with pytest.raises(FloatingPointError, match="in the last 1 step"):
            trainer.train()
    assert (tmp_path / "model_index.json").exists() == has_scaler
