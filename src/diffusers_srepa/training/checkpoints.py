"""Checkpoints: a folder with all that a run needs to go on, complete or absent, and free of pickles.

    checkpoint-<step>/
        transformer/, projectors/<name>/    the trained weights, each loadable by `from_pretrained`
        ema.safetensors                     the averaged weights, by parameter name
        optimizer.safetensors               the optimiser's tensors, as <parameter name>/<key>
        state.json                          step, schedules, scaler, dataset, optimiser settings
        config.yaml                         the resolved configuration
        manifest.json                       size and SHA-256 of every other file

A checkpoint is written into a temporary folder, flushed to disk and renamed. Order of data and random numbers are
functions of seed and step, so there is no generator state to keep.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.checkpoint_folder import (
    STATE_FILE,
    TEMPORARY_PREFIX,
    flush,
    flush_entry,
    write_manifest,
)
from diffusers_srepa.training.ema import WeightAverage
from diffusers_srepa.training.run_folder import CHECKPOINT_PREFIX, checkpoint_folders
from diffusers_srepa.training.snapshot import Snapshot, load_optimizer_state


_FORMAT = 1


@dataclass
class RunState:
    """What else a run needs besides its tensors.

    Args:
        step: Optimiser steps made.
        seed: Seed of the run.
        global_batch_size: Images per step; with the seed it decides who sees what.
        num_processes: Number of processes that wrote the checkpoint.
        dataset_fingerprint: Identity of the dataset's content.
        replaced_images: Unreadable images replaced so far.
        skipped_steps: Steps skipped so far because loss or gradient was not finite.
        scaler: State of the fp16 loss scaler, empty without one.
    """

    step: int
    seed: int
    global_batch_size: int
    num_processes: int
    dataset_fingerprint: str
    replaced_images: int = 0
    skipped_steps: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def save_checkpoint(output_dir: Path, state: RunState, snapshot: Snapshot, config_text: str) -> Path:
    """Write `checkpoint-<step>`; on any error no such folder appears and what was there stays.

    Args:
        output_dir (`Path`): folder of the run.
        state (`RunState`): the run's scalars.
        snapshot (`Snapshot`): the run's tensors.
        config_text (`str`): the resolved configuration as YAML.

    Returns:
        `Path`: the finished folder.

    Raises:
        CheckpointError: the disk is full or fails otherwise.
    """
    final = output_dir / f"{CHECKPOINT_PREFIX}{state.step}"
    with _temporary_folder(final) as temporary:
        transformer: Any = snapshot.student.transformer
        transformer.save_pretrained(temporary / "transformer")
        snapshot.student.save_projectors(temporary / "projectors")
        _save_tensors(snapshot.average, temporary / "ema.safetensors")
        _save_tensors(snapshot.optimizer, temporary / "optimizer.safetensors")
        document = {"format": _FORMAT, **vars(state), "optimizer": snapshot.groups}
        (temporary / STATE_FILE).write_text(json.dumps(document, indent=1))
        (temporary / "config.yaml").write_text(config_text)
        write_manifest(temporary)
        flush(temporary)
        _replace_folder(temporary, final)
    return final


@contextmanager
def _temporary_folder(final: Path) -> Iterator[Path]:
    """A fresh folder beside `final`, gone if anything fails."""
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{final.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(f"{final.name} could not be written to {final.parent}", error, final.parent) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def writing_to(output_dir: Path) -> Iterator[None]:
    """Around all that writes to a run's folder: what the disk refuses becomes one sentence.

    Raises:
        CheckpointError: instead of any other `OSError`.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise _cannot_write(f"the output folder {output_dir} could not be written to", error, output_dir) from error


def _cannot_write(what: str, error: Exception, output_dir: Path) -> CheckpointError:
    saved = checkpoint_folders(output_dir)
    last = f"the last complete checkpoint is {saved[-1].name}" if saved else "there is no complete checkpoint"
    reason = " ".join(str(error).split())
    is_missing = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError)
    remedy = "see what has become of the folder" if is_missing else "make room or set checkpoints.total_limit"
    return CheckpointError(f"{what} ({reason}); {last}: {remedy}, then go on with --resume_from_checkpoint latest.")


def read_state(folder: Path) -> RunState:
    """The scalars of a checkpoint.

    Raises:
        ConfigurationError: another version wrote it.
    """
    document = json.loads((folder / STATE_FILE).read_text())
    if document.pop("format", None) != _FORMAT:
        raise ConfigurationError(f"the checkpoint {folder} has another format than this version writes ({_FORMAT}).")
    document.pop("optimizer", None)
    unknown = sorted(document.keys() - {entry.name for entry in fields(RunState)})
    if unknown:
        raise ConfigurationError(
            f"{STATE_FILE} of the checkpoint {folder} holds {', '.join(unknown)}, which this version does not know: "
            "go on with the version of diffusers_srepa that wrote it."
        )
    return RunState(**document)


def load_checkpoint(
    folder: Path, student: AlignedDenoiser, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> RunState:
    """Put everything of a checkpoint back into the freshly built parts of a run that is not sharded.

    Raises:
        ConfigurationError: the checkpoint holds another model, other projectors or another optimiser.
    """
    load_trained_weights(folder, student)
    load_training_state(folder, student, average, optimizer)
    return read_state(folder)


def load_training_state(
    folder: Path, student: AlignedDenoiser, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> None:
    """Put back what only training needs, average and optimiser, also of sharded weights.

    Raises:
        ConfigurationError: the checkpoint holds another model or another optimiser.
    """
    groups = json.loads((folder / STATE_FILE).read_text())["optimizer"]
    with _fitting(folder):
        average.load_state(load_file(folder / "ema.safetensors"), num_updates=read_state(folder).step)
        load_optimizer_state(optimizer, student, load_file(folder / "optimizer.safetensors"), groups)


def load_trained_weights(folder: Path, student: AlignedDenoiser) -> None:
    """Copy the weights under `transformer/` and `projectors/` of a checkpoint into `student`, before it is sharded.

    Raises:
        ConfigurationError: the weights do not fit.
    """
    transformer: Any = student.transformer
    with _fitting(folder):
        loaded = type(transformer).from_pretrained(folder / "transformer")
        transformer.load_state_dict(loaded.state_dict())
        student.load_projectors(folder / "projectors")


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"the checkpoint {folder} does not fit the model that the configuration describes: {reason}"
        ) from None


def _save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def _replace_folder(new: Path, final: Path) -> None:
    # A folder cannot be renamed over another: the old one steps aside first, and goes when the new one is in place.
    old = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    flush_entry(final.parent)
    shutil.rmtree(old, ignore_errors=True)
