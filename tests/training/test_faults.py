"""Faults in the middle of a run: full disks, and the end of a run that is not its end."""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.training import export, signals
from diffusers_srepa.training.checkpoint import read_state
from diffusers_srepa.training.resume import Resumed
from diffusers_srepa.training.run_folder import CheckpointError
from diffusers_srepa.training.signals import StopRequest, TrainingInterrupted, outlive_signals
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.run_losses import before_step
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


def _fill_disk(limit: int = 20_000) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_is_full_ends_the_run_in_one_sentence_and_it_goes_on_later(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path / "whole").train()
    trainer = _trainer(assets, tmp_path / "run")
    before_step(trainer, 2, _fill_disk)
    with _small_files_only(), pytest.raises(CheckpointError) as error:
        trainer.train()
    message = str(error.value)
    assert "checkpoint-4 could not be written" in message and "the last complete checkpoint is checkpoint-2" in message
    assert "\n" not in message and not list((tmp_path / "run").glob(".incomplete-*"))
    _trainer(assets, tmp_path / "run", "--resume_from_checkpoint", "latest").train()
    for file in (
        "raw.safetensors",
        "optimizer_student.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    ):
        ours, expected = (load_file(tmp_path / name / "checkpoint-4" / file) for name in ("run", "whole"))
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("what", ["metrics", "pictures"])
def test_whatever_cannot_be_written_is_one_sentence_that_names_the_last_checkpoint(
    assets: Path, tmp_path: Path, what: str
) -> None:
    options = ["--training.log_every", "4", "--validation.every", "3"] if what == "pictures" else []
    trainer = _trainer(assets, tmp_path, *options)
    before_step(trainer, 2, lambda: _fill_disk(50))
    with (
        _small_files_only(),
        pytest.raises(CheckpointError, match="last complete checkpoint is checkpoint-2") as error,
    ):
        trainer.train()
    assert "\n" not in str(error.value) and f"{tmp_path} could not be written to" in str(error.value)


def test_a_console_that_is_gone_does_not_end_a_run(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as console:
        monkeypatch.setattr(sys, "stderr", console)
        trainer = _trainer(assets, tmp_path)
        before_step(trainer, 1, lambda: os.close(reading))
        trainer.train()
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            console.write("\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
    assert (tmp_path / "model_index.json").exists()


def test_a_signal_while_the_pipeline_is_written_lets_the_run_finish(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(assets, tmp_path)
    save_finished = export.save_finished

    def save(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save_finished(*arguments)

    monkeypatch.setattr(export, "save_finished", save)
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert (tmp_path / "model_index.json").exists() and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_images_are_sampled_gives_them_up_and_stops(assets: Path, tmp_path: Path) -> None:
    # So many model calls that the test would not end by itself.
    trainer = _trainer(assets, tmp_path, "--validation.every", "1", "--sampling.num_inference_steps", "1000000")
    calls = []

    def ask(module: torch.nn.Module, inputs: Any) -> None:
        if not module.training:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.method.transformer.register_forward_pre_hook(ask)
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM after step 1; the newest checkpoint is .*-1:"):
        trainer.train()
    assert len(calls) <= 4 and not (tmp_path / "validation").exists()


def test_signals_in_quick_succession_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with StopRequest(Accelerator(cpu=True)) as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested() and received == []
            monkeypatch.setattr(signals, "_SECONDS_OF_ONE_REQUEST", 0.0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_between_two_pipelines_there_is_none(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(assets, tmp_path)
    trainer.train()

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        trainer.writer.finish(4, None)
    assert not (tmp_path / "model_index.json").exists()
    _trainer(assets, tmp_path, "--resume_from_checkpoint", "latest").train()
    SiTPipeline.from_pretrained(tmp_path)


def test_a_pipeline_that_cannot_be_written_is_written_by_a_resume(assets: Path, tmp_path: Path) -> None:
    _trainer(assets, tmp_path).train()
    shutil.rmtree(tmp_path / "transformer")
    (tmp_path / "model_index.json").unlink()
    trainer = _trainer(assets, tmp_path, "--resume_from_checkpoint", "latest")
    with _small_files_only(), pytest.raises(CheckpointError, match="the finished pipeline could not be written"):
        _fill_disk()
        trainer.train()
    assert not (tmp_path / "model_index.json").exists() and not list(tmp_path.glob(".incomplete-*"))
    _trainer(assets, tmp_path, "--resume_from_checkpoint", "latest").train()
    pipeline = SiTPipeline.from_pretrained(tmp_path)
    average = load_file(tmp_path / "checkpoint-4" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, weight in pipeline.transformer.named_parameters():
        assert torch.equal(weight, average[name]), name


def test_the_state_of_the_loss_scaler_is_resumed(assets: Path, tmp_path: Path) -> None:
    options = ["--training.max_steps", "2"]
    trainer = _trainer(assets, tmp_path, *options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    trainer.accelerator.scaler = scaler
    phase = trainer.training.optimizers["student"]
    phase.optimizer = AcceleratedOptimizer(phase.optimizer.optimizer, scaler=scaler)
    trainer.train()
    grown = {"scale": 2048.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2, "_growth_tracker": 0}
    assert scaler.state_dict() == grown
    again = _trainer(assets, tmp_path, "--training.max_steps", "3", "--resume_from_checkpoint", "latest")
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    again._restore(Resumed(tmp_path / "checkpoint-2", read_state(tmp_path / "checkpoint-2")))
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
