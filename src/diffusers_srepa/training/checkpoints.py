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

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.ema import WeightAverage
from diffusers_srepa.training.run_folder import CHECKPOINT_PREFIX, checkpoint_folders


logger = get_logger(__name__)

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
_TEMPORARY_PREFIX = ".incomplete-"
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
        scaler: State of the fp16 loss scaler, empty without one.
    """

    step: int
    seed: int
    global_batch_size: int
    num_processes: int
    dataset_fingerprint: str
    replaced_images: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    student: AlignedDenoiser,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    config_text: str,
) -> Path:
    """Write `checkpoint-<step>`; on any error no such folder appears and what was there stays.

    Args:
        output_dir (`Path`): folder of the run.
        state (`RunState`): the run's scalars.
        student (`AlignedDenoiser`): the unwrapped trained module.
        average (`WeightAverage`): its moving average.
        optimizer (`torch.optim.Optimizer`): the plain optimiser over the student's parameters.
        config_text (`str`): the resolved configuration as YAML.

    Returns:
        `Path`: the finished folder.
    """
    final = output_dir / f"{CHECKPOINT_PREFIX}{state.step}"
    temporary = output_dir / f"{_TEMPORARY_PREFIX}{CHECKPOINT_PREFIX}{state.step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        transformer: Any = student.transformer
        transformer.save_pretrained(temporary / "transformer")
        student.save_projectors(temporary / "projectors")
        _save_tensors(average.state(), temporary / "ema.safetensors")
        tensors, groups = optimizer_state(optimizer, student)
        _save_tensors(tensors, temporary / "optimizer.safetensors")
        document = {"format": _FORMAT, **vars(state), "optimizer": groups}
        (temporary / STATE_FILE).write_text(json.dumps(document, indent=1))
        (temporary / "config.yaml").write_text(config_text)
        _write_manifest(temporary)
        _flush(temporary)
        _replace_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_checkpoint(
    folder: Path, student: AlignedDenoiser, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> RunState:
    """Put everything of a checkpoint back into the freshly built parts of a run.

    Raises:
        ConfigurationError: the checkpoint holds another model, other projectors or another optimiser.
    """
    document = json.loads((folder / STATE_FILE).read_text())
    if document.pop("format", None) != _FORMAT:
        raise ConfigurationError(f"the checkpoint {folder} has another format than this version writes ({_FORMAT}).")
    groups = document.pop("optimizer")
    state = RunState(**document)
    try:
        load_trained_weights(folder, student)
        average.load_state(load_file(folder / "ema.safetensors"), num_updates=state.step)
        load_optimizer_state(optimizer, student, load_file(folder / "optimizer.safetensors"), groups)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"the checkpoint {folder} does not fit the model that the configuration describes: {reason}"
        ) from None
    return state


def load_trained_weights(folder: Path, student: AlignedDenoiser) -> None:
    """Copy the weights under `transformer/` and `projectors/` of `folder` into `student`.

    Raises:
        ValueError, RuntimeError: the weights do not fit.
    """
    transformer: Any = student.transformer
    loaded = type(transformer).from_pretrained(folder / "transformer")
    transformer.load_state_dict(loaded.state_dict())
    student.load_projectors(folder / "projectors")


def optimizer_state(
    optimizer: torch.optim.Optimizer, student: torch.nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimiser's tensors as `<parameter name>/<key>`, and the names of its parameters by group."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            tensors[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    return tensors, {"parameters": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    student: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
) -> None:
    """The inverse of `optimizer_state`.

    Raises:
        ValueError: a saved parameter is unknown, or the groups hold other parameters.
    """
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    present = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if present != settings["parameters"]:
        raise ValueError("the saved optimiser has other parameters than this run trains.")
    order = {name: index for index, name in enumerate(name for group in present for name in group)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(order[name], {})[key] = tensor
    # Learning rate, betas and the like are this run's: the configuration says them, and a resume compares it.
    groups = [
        {**group, "params": [order[name] for name in names_of_group]}
        for group, names_of_group in zip(optimizer.param_groups, present, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means.

    Args:
        output_dir (`Path`): folder of the run.
        wanted (`str`): `"latest"` takes the newest intact checkpoint, naming the damaged ones that it passes over;
            else the path of a checkpoint, absolute or below `output_dir`.

    Returns:
        `Path`, or None if `"latest"` finds no checkpoint at all.

    Raises:
        ConfigurationError: the named checkpoint does not exist or is damaged, or all of them are.
    """
    if wanted != "latest":
        folder = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
        if not folder.is_dir():
            raise ConfigurationError(
                f"there is no checkpoint {wanted}: set --resume_from_checkpoint to a folder, or to latest."
            )
        damage = find_damage(folder)
        if damage:
            raise ConfigurationError(f"the checkpoint {folder} is damaged ({damage}): resume from another one.")
        return folder
    folders = checkpoint_folders(output_dir)
    for folder in reversed(folders):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning(f"the checkpoint {folder} is damaged ({damage}) and passed over.")
    if folders:
        raise ConfigurationError(
            f"all {len(folders)} checkpoints in {output_dir} are damaged: start anew in another --output_dir."
        )
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST_FILE} is missing or unreadable"
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        if _digest(file) != expected["sha256"]:
            return f"{name} has other content than was written"
    return None


def prune_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; called after a new one is complete, so one always remains."""
    if limit is None:
        return
    for folder in checkpoint_folders(output_dir)[:-limit]:
        shutil.rmtree(folder)


def set_aside_later(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step`, from which a resumed run goes another way, so that `latest` passes them."""
    for folder in checkpoint_folders(output_dir):
        if int(folder.name.removeprefix(CHECKPOINT_PREFIX)) > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            logger.warning(f"{folder.name} lies after the step that the run resumes from: it is now {aside.name}.")


def remove_incomplete(output_dir: Path) -> None:
    """Delete what a killed run left half-written."""
    for folder in output_dir.glob(f"{_TEMPORARY_PREFIX}{CHECKPOINT_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def _write_manifest(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _digest(file)} for file in files
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace_folder(new: Path, final: Path) -> None:
    # A folder cannot be renamed over another: the old one steps aside first, and goes when the new one is in place.
    old = final.with_name(f"{_TEMPORARY_PREFIX}{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    _flush_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
