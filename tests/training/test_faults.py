"""Faults in the middle of a run: full disks, and the end of a run that is not its end."""

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from diffusers_srepa.pipelines.pipeline_sit import SiTPipeline
from diffusers_srepa.training.checkpoints import CheckpointError, read_state
from diffusers_srepa.training.command_line import load_training_config
from diffusers_srepa.training.interruption import outlive_signals
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.tiny_run import write_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("assets"))


def _trainer(assets: Path, folder: Path, *options: str) -> Trainer:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(folder), *options]
    return Trainer(load_training_config(arguments))


@contextmanager
def _small_files_only() -> Iterator[None]:
    """Files cannot grow beyond 20 kB: logs can be written, weights cannot."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _disk_is_full_from(trainer: Trainer, full_step: int) -> None:
    method = trainer.method

    def step_of(batch: Any, step: int) -> Any:
        if step == full_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return method(batch, step)

    step_of.student = method.student  # type: ignore[attr-defined]
    trainer.method = step_of  # type: ignore[assignment]


def test_a_disk_that_is_full_ends_the_run_in_one_sentence_and_it_goes_on_later(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path / "whole").train()
    trainer = _trainer(assets, tmp_path / "run")
    _disk_is_full_from(trainer, 2)
    with _small_files_only(), pytest.raises(CheckpointError) as error:
        trainer.train()
    message = str(error.value)
    assert "checkpoint-4 could not be written" in message and "the last complete one is checkpoint-2" in message
    assert "\n" not in message and not list((tmp_path / "run").glob(".incomplete-*"))
    _trainer(assets, tmp_path / "run", "--resume_from_checkpoint", "latest").train()
    for file in ("ema.safetensors", "optimizer.safetensors"):
        ours, expected = (load_file(tmp_path / name / "checkpoint-4" / file) for name in ("run", "whole"))
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_pipeline_that_cannot_be_written_is_written_by_a_resume(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path).train()
    shutil.rmtree(tmp_path / "transformer")
    (tmp_path / "model_index.json").unlink()
    trainer = _trainer(assets, tmp_path, "--resume_from_checkpoint", "latest")
    with _small_files_only(), pytest.raises(CheckpointError, match="the finished pipeline could not be written"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        trainer.train()
    assert not (tmp_path / "model_index.json").exists() and not list(tmp_path.glob(".incomplete-*"))
    _trainer(assets, tmp_path, "--resume_from_checkpoint", "latest").train()
    pipeline = SiTPipeline.from_pretrained(tmp_path)
    average = load_file(tmp_path / "checkpoint-4" / "ema.safetensors")
    for name, weight in pipeline.transformer.named_parameters():
        assert torch.equal(weight, average[f"transformer.{name}"]), name


def test_the_state_of_the_loss_scaler_is_resumed(assets: Path, tmp_path: Path) -> None:
    options = ["--training.max_steps", "2"]
    trainer = _trainer(assets, tmp_path, *options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    trainer.accelerator.scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.train()
    grown = {"scale": 2048.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2, "_growth_tracker": 0}
    assert scaler.state_dict() == grown
    again = _trainer(assets, tmp_path, "--training.max_steps", "3", "--resume_from_checkpoint", "latest")
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    again._restore(tmp_path / "checkpoint-2", read_state(tmp_path / "checkpoint-2"))
    assert again.accelerator.scaler.state_dict() == grown


def test_loader_processes_outlive_the_signals_of_their_group() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    child = os.fork()
    if child == 0:
        outlive_signals(0)
        for number in handlers:
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
