"""Checkpoints: a folder with all that a run needs to go on, loadable as a pipeline, and free of pickles.

    checkpoint-<step>/                      format 2
        transformer/, projectors/<name>/    the averaged weights of what is trained, each part in its own folder
        model_index.json, scheduler/        with which `SiTPipeline.from_pretrained` loads the folder
        autoencoder.json                    where the pipeline's autoencoder is; it is not copied
        raw.safetensors                     the trained weights themselves, as <module>.<name in the module>
        optimizer_<phase>.safetensors       an optimiser's tensors, as <module>.<parameter>/<key>
        state.json                          step, counters, scaler, dataset, parameters of the optimisers
        config.yaml                         the resolved configuration
        manifest.json                       size and SHA-256 of every other file

Format 1, of versions before, has the trained weights in the parts' folders, the average in `ema.safetensors` and one
`optimizer.safetensors`, names without the module; it is read, never written. Order of data and random numbers are
functions of seed and step, so there is no generator to save.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_srepa.errors import ConfigurationError, one_line
from diffusers_srepa.files import written_folder
from diffusers_srepa.pipelines.checkpoint import AUTOENCODER_FILE
from diffusers_srepa.training.distributed import shard_like
from diffusers_srepa.training.method import saved_parts
from diffusers_srepa.training.optimizers import EMA, named_parameters
from diffusers_srepa.training.run_folder import (
    CHECKPOINT_PREFIX,
    CONFIG_FILE,
    STATE_FILE,
    write_manifest,
    writing_to,
)


FORMAT = 2
RAW_FILE = "raw.safetensors"


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


Optimizers = Mapping[str, torch.optim.Optimizer]
"""The plain optimisers of a run by phase."""


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    *,
    raw: Mapping[str, torch.Tensor],
    averaged: Mapping[str, nn.Module],
    optimizers: Mapping[str, tuple[Mapping[str, torch.Tensor], list[list[str]]]],
    pipeline: Any,
    autoencoder: Mapping[str, Any] | None,
    config_text: str,
) -> Path:
    """Write `checkpoint-<step>`; on any error no such folder appears and what was there stays.

    Args:
        output_dir (`Path`): folder of the run.
        state (`RunState`): the run's scalars.
        raw (`Mapping[str, torch.Tensor]`): the trained weights by `<module>.<name>`, whole.
        averaged (`Mapping[str, nn.Module]`): the modules with their averaged weights, whole.
        optimizers: `optimizer_state` of each phase by name, whole.
        pipeline (`DiffusionPipeline`): the pipeline around `averaged`.
        autoencoder (`Mapping`, *optional*): where the pipeline's `vae` comes from.
        config_text (`str`): the resolved configuration as YAML.

    Returns:
        `Path`: the finished folder.

    Raises:
        CheckpointError: the disk is full or fails otherwise.
    """
    final = output_dir / f"{CHECKPOINT_PREFIX}{state.step}"
    groups = {name: names for name, (_, names) in optimizers.items()}
    document = {"format": FORMAT, **vars(state), "optimizers": groups}
    with writing_to(output_dir, final.name), written_folder(final) as folder:
        save_parts(averaged, folder)
        for name, component in pipeline.components.items():
            if component is not None and name != "vae" and not (folder / name).exists():
                component.save_pretrained(folder / name)
        pipeline.save_config(folder)
        if autoencoder is not None:
            (folder / AUTOENCODER_FILE).write_text(json.dumps(autoencoder, indent=1))
        save_tensors(raw, folder / RAW_FILE)
        for name, (tensors, _) in optimizers.items():
            save_tensors(tensors, folder / f"optimizer_{name}.safetensors")
        (folder / STATE_FILE).write_text(json.dumps(document, indent=1))
        (folder / CONFIG_FILE).write_text(config_text)
        write_manifest(folder)
    return final


def save_parts(modules: Mapping[str, nn.Module], folder: Path, without: tuple[str, ...] = ()) -> None:
    """Write what each module saves, with the weights that it has, into its own folder below `folder`."""
    for name, (_, part) in saved_parts(modules).items():
        if name in without:
            continue
        save_pretrained: Any = getattr(part, "save_pretrained", None)
        if save_pretrained is not None:
            save_pretrained(folder / name)
        else:
            (folder / name).mkdir(parents=True)
            save_tensors(part.state_dict(), folder / name / "model.safetensors")


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write tensors of any device as safetensors, those that share memory (tied weights) each for itself."""
    whole: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        whole[name] = value.clone() if storage in storages else value
        storages.add(storage)
    save_file(whole, file)


def read_state(folder: Path) -> RunState:
    """The scalars of a checkpoint.

    Raises:
        ConfigurationError: another version wrote it.
    """
    document = _read_document(folder)
    for key in ("format", "optimizer", "optimizers"):
        document.pop(key, None)
    unknown = sorted(document.keys() - {entry.name for entry in fields(RunState)})
    if unknown:
        raise ConfigurationError(
            f"{STATE_FILE} of the checkpoint {folder} holds {', '.join(unknown)}, which this version does not know: "
            "go on with the version of diffusers_srepa that wrote it."
        )
    return RunState(**document)


def _read_document(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / STATE_FILE).read_text())
    if document.get("format") not in (1, FORMAT):
        raise ConfigurationError(
            f"the checkpoint {folder} has the format {document.get('format')}, but this version reads 1 to {FORMAT}: "
            "go on with the version of diffusers_srepa that wrote it."
        )
    return document


def load_raw_weights(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Copy the trained weights of a checkpoint into `modules`, before they are sharded.

    Raises:
        ConfigurationError: the weights do not fit.
    """
    document = _read_document(folder)
    with _fitting(folder):
        if document["format"] == 1:
            raw = _read_parts(folder, modules)
        else:
            raw = load_file(folder / RAW_FILE)
        for name, module in modules.items():
            weights = _of_module(raw, name)
            own = module.state_dict()
            missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
            if missing or unknown:
                raise ValueError(
                    f"{len(missing)} tensors of {name} are missing ({', '.join(sorted(missing)[:1])}), {len(unknown)} "
                    f"are unknown ({', '.join(sorted(unknown)[:1])})"
                )
            module.load_state_dict(weights)


def load_training_state(folder: Path, modules: Mapping[str, nn.Module], ema: EMA, optimizers: Optimizers) -> None:
    """Put back what only training needs, average and optimisers, also of sharded weights.

    Raises:
        ConfigurationError: the checkpoint holds other modules or other optimisers.
    """
    document = _read_document(folder)
    with _fitting(folder):
        if document["format"] == 1:
            # One module and one phase, the only ones there were.
            module, phase = next(iter(modules)), next(iter(optimizers))
            averages = _prefixed(load_file(folder / "ema.safetensors"), module)
            states = {phase: _prefixed(load_file(folder / "optimizer.safetensors"), module)}
            groups = [[f"{module}.{name}" for name in group] for group in document["optimizer"]["parameters"]]
            all_groups = {phase: groups}
        else:
            parts = _read_parts(folder, modules)
            averages = {name: parts[name] for name in named_parameters(modules)}
            all_groups = document["optimizers"]
            states = {name: load_file(folder / f"optimizer_{name}.safetensors") for name in all_groups}
        ema.load(averages)
        if states.keys() != optimizers.keys():
            raise ValueError(f"it has the phases {', '.join(states)}, but the method has {', '.join(optimizers)}")
        for name, optimizer in optimizers.items():
            load_optimizer_state(optimizer, modules, states[name], all_groups[name])


def optimizer_state(
    optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """The optimiser's tensors as `<module>.<parameter>/<key>`, and the names of its parameters by group."""
    names = {id(parameter): name for name, parameter in named_parameters(modules).items()}
    tensors: dict[str, torch.Tensor] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            tensors[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
    return tensors, [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, torch.Tensor],
    groups: list[list[str]],
) -> None:
    """The inverse of `optimizer_state`.

    Raises:
        ValueError: the groups hold other parameters.
    """
    parameters = named_parameters(modules)
    _, present = optimizer_state(optimizer, modules)
    if present != groups:
        raise ValueError("the saved optimiser has other parameters than this run trains")
    order = {name: index for index, name in enumerate(name for group in present for name in group)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(order[name], {})[key] = shard_like(tensor, parameters[name])
    # Learning rate, betas and the like are this run's: the configuration says them, and a resume compares it.
    numbered = [
        {**group, "params": [order[name] for name in names]}
        for group, names in zip(optimizer.param_groups, present, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": numbered})


def _read_parts(folder: Path, modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The weights in the parts' folders by `<module>.<name in the module>`."""
    weights: dict[str, torch.Tensor] = {}
    for part_folder, (module, part) in saved_parts(modules).items():
        place = next(name for name, inner in modules[module].named_modules() if inner is part)
        files = sorted((folder / part_folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"the folder {part_folder} holds no weights")
        for file in files:
            weights |= _prefixed(load_file(file), f"{module}.{place}" if place else module)
    return weights


def _prefixed(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _of_module(tensors: Mapping[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    prefix = f"{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"the checkpoint {folder} does not fit the model that the configuration describes: {one_line(error)}."
        ) from None
