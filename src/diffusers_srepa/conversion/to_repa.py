"""From a pipeline of this package to a state dict that the samplers of REPA, iREPA and REG load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from diffusers_srepa.alignment.projectors import CONFIG_FILE, WEIGHTS_FILE, saved_class_name
from diffusers_srepa.alignment.registry import PROJECTORS
from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.conversion.convert import Conversion
from diffusers_srepa.conversion.projectors import to_official_names
from diffusers_srepa.conversion.repa import to_official
from diffusers_srepa.conversion.write_pipeline import write_file
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel


FILE_NAME = "checkpoint.pt"
_PROJECTOR_CLASSES = {cls.__name__: cls for cls in PROJECTORS.values()}
_PATTERNS = ["transformer/*", "projectors/*", "model_index.json"]


def export_checkpoint(
    pipeline: str | Path, output: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Conversion:
    """Write `{"ema": state, "model": state}` with the official names of REPA, or of REG for a model with class token.

    `generate.py` of REPA and REG reads `ema` from it; both entries are the same tensors, stored once. The optimiser's
    state is not part of a pipeline, so the official trainers cannot resume from the file.

    Args:
        pipeline (`str` or `Path`): folder or Hub id of a pipeline; `projectors/` beside it is exported too.
        output (`str` or `Path`): the file, if its name ends in `.pt`, else the folder for `checkpoint.pt`.
        dtype (`torch.dtype`, *optional*): precision, by default the one the weights are stored in.
        overwrite (`bool`): whether an existing file may be replaced.

    Raises:
        ConfigurationError: no pipeline, or one that REPA's code cannot represent; nothing has been written then.
    """
    file = Path(output) if Path(output).suffix == ".pt" else Path(output) / FILE_NAME
    _check_target(file, overwrite)
    folder = _find_folder(str(pipeline))
    if folder.resolve() in file.resolve().parents:
        raise ConfigurationError(f"{file} would lie in the pipeline's own folder: choose another --output_dir.")
    transformer = _load_transformer(folder, dtype)
    _check_representable(transformer)
    state = to_official(transformer)
    projectors = dict(_load_projectors(folder, dtype))
    for number, projector in enumerate(projectors.values()):
        state |= to_official_names(number, projector)
    write_file(file, lambda path: torch.save({"model": state, "ema": state}, path))
    kind = "REG" if transformer.config.class_token_dim is not None else "REPA"
    found = ", ".join(f"projectors.{number} is {name!r}" for number, name in enumerate(projectors)) or "no projectors"
    return Conversion(
        file, f"{kind} state dict of {len(state)} tensors, {found}", _notes(transformer, bool(projectors))
    )


def _check_target(file: Path, overwrite: bool) -> None:
    if file.is_dir() or (file.parent.exists() and not file.parent.is_dir()):
        raise ConfigurationError(f"{file} cannot be a file there: choose another --output_dir.")
    if file.exists() and not overwrite:
        raise ConfigurationError(f"the file {file} exists: choose another --output_dir, or replace it by --overwrite.")


def _find_folder(source: str) -> Path:
    """The pipeline's folder, fetched if it is on the Hub."""
    folder = Path(source)
    if folder.is_file():
        raise ConfigurationError(f"{source} is a file, but --to repa needs the folder or Hub id of a pipeline.")
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=_PATTERNS))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigurationError(f"there is no pipeline {source}: {reason}") from None
    if not (folder / "transformer" / CONFIG_FILE).is_file():
        raise ConfigurationError(
            f"{source} has no folder transformer with a config.json: give --checkpoint the folder of a pipeline."
        )
    return folder


def _load_transformer(folder: Path, dtype: torch.dtype | None) -> SiTTransformer2DModel:
    config = _read_json(folder / "transformer" / CONFIG_FILE)
    class_name = SiTTransformer2DModel.__name__
    if config.get("_class_name") != class_name:
        raise ConfigurationError(f"{folder} holds a {config.get('_class_name')}, but must hold a {class_name}.")
    return _build(SiTTransformer2DModel, folder / "transformer", dtype)


def _load_projectors(folder: Path, dtype: torch.dtype | None) -> Iterator[tuple[str, nn.Module]]:
    """Projectors by name, the one called "default" first."""
    parent = folder / "projectors"
    names = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    for name in sorted(names, key=lambda name: (name != DEFAULT, name)):
        class_name = saved_class_name(parent / name)
        if class_name not in _PROJECTOR_CLASSES:
            raise ConfigurationError(
                f"the projector {parent / name} is {class_name or 'of an unknown class'}, which REPA and iREPA do not "
                "have: move its folder away."
            )
        yield name, _build(_PROJECTOR_CLASSES[class_name], parent / name, dtype)


def _build(cls: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """A saved model with each tensor in the dtype it is stored in, which `from_pretrained` would change to one."""
    try:
        with torch.device("meta"):
            model = cls.from_config(_read_json(folder / CONFIG_FILE))
        model.load_state_dict(_read_weights(folder), assign=True)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigurationError(
            f"the model in {folder} cannot be loaded ({reason}): give a complete pipeline."
        ) from None
    return model if dtype is None else model.to(dtype)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file, or of the shards that an index lists."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS_FILE]
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= load_file(folder / file)
    return state


def _check_representable(transformer: SiTTransformer2DModel) -> None:
    config = transformer.config
    rows, columns = transformer.grid_size
    problems = {
        f"out_channels {transformer.out_channels} for {config.in_channels} in_channels": (
            transformer.out_channels != config.in_channels
        ),
        f"norm_eps {config.norm_eps} instead of 1e-6": config.norm_eps != 1e-6,
        f"latents that are no square, {rows} x {columns} patches": rows != columns,
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise ConfigurationError(f"the transformer has {found[0]}, which REPA's code cannot represent.")


def _notes(transformer: SiTTransformer2DModel, has_projectors: bool) -> tuple[str, ...]:
    config = transformer.config
    notes = []
    if not has_projectors:
        notes.append(
            "there are no projectors, which REPA's generate.py expects: load the file there with strict=False."
        )
    sizes = {name: config[name] for name in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")}
    if sizes not in SIT_PRESETS.values() or config.mlp_ratio != 4:
        notes.append(
            "the transformer has none of the official sizes, so REPA's code needs a model function of its own."
        )
    if config.class_dropout_prob == 0:
        notes.append("the label table has no row for a null class, which REPA's code always adds.")
    return tuple(notes)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigurationError(f"{file} is no valid JSON: give --checkpoint the folder of a pipeline.") from None
