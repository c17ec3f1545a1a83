"""From a pipeline or a checkpoint of this package to a state dict that the samplers of REPA, iREPA and REG load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusers_srepa.alignment.projectors import CONFIG_FILE, saved_class_name
from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.conversion.convert import Conversion, find_dtype, written_or_refused
from diffusers_srepa.conversion.projectors import PROJECTOR_CLASSES, to_official_names
from diffusers_srepa.conversion.weights import to_official
from diffusers_srepa.errors import ConfigurationError, in_options, one_line
from diffusers_srepa.files import check_output_place, written_file
from diffusers_srepa.models.loading import find_folder, has_raw_weights, projector_names, read_json, read_weights
from diffusers_srepa.models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel


FILE_NAME = "checkpoint.pt"


def export_checkpoint(
    source: str | Path, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> Conversion:
    """Write `{"ema": state, "model": state}` with the official names of REPA, or of REG for a model with class token.

    `generate.py` of REPA and REG reads `ema` from it: the averaged weights. `model` has the trained weights themselves
    where `source` is a checkpoint, which holds both; of a pipeline both entries are the same tensors, stored once. The
    optimiser's state is not exported, so the official trainers cannot resume from the file.

    Args:
        source (`str` or `Path`): folder or Hub id of a pipeline, or folder `checkpoint-<step>` of a run; `projectors/`
            in it is exported too.
        output (`str` or `Path`): the file, if its name ends in `.pt`, else the folder for `checkpoint.pt`.
        dtype (`str`, *optional*): precision, "float32", "bfloat16", "float16" or "float64"; by default the one that
            the weights are stored in.
        overwrite (`bool`): whether an existing file may be replaced.

    Raises:
        ConfigurationError: no pipeline, or one that REPA's code cannot represent; nothing has been written then.
    """
    precision = find_dtype(dtype)
    file = Path(output) if Path(output).suffix == ".pt" else Path(output) / FILE_NAME
    with in_options({"output_dir": "`output`"}):
        check_output_place(file.parent)
    if file.is_dir() or (file.parent.exists() and not file.parent.is_dir()):
        raise ConfigurationError(f"{file} cannot be a file there: choose another `output`.")
    if file.exists() and not overwrite:
        raise ConfigurationError(f"the file {file} exists: choose another `output`, or replace it by `overwrite`.")
    folder = find_folder(source)
    if folder.resolve() in file.resolve().parents:
        raise ConfigurationError(f"{file} would lie in the pipeline's own folder: choose another `output`.")
    transformer = _transformer(folder)
    # The one called "default" first.
    names = sorted(projector_names(folder), key=lambda name: (name != DEFAULT, name))
    ema = _official_state(folder, transformer, names, precision, raw=False)
    model = _official_state(folder, transformer, names, precision, raw=True) if has_raw_weights(folder) else ema
    with written_or_refused(file), written_file(file.resolve()) as path:
        torch.save({"model": model, "ema": ema}, path)
    kind = "REG" if transformer.config.class_token_dim is not None else "REPA"
    found = ", ".join(f"projectors.{number} is {name!r}" for number, name in enumerate(names)) or "no projectors"
    return Conversion(file, f"{kind} state dict of {len(ema)} tensors, {found}", _notes(transformer, bool(names)))


def _transformer(folder: Path) -> SiTTransformer2DModel:
    """The transformer without its weights."""
    config = read_json(folder / "transformer" / CONFIG_FILE)
    class_name = SiTTransformer2DModel.__name__
    if config.get("_class_name") != class_name:
        raise ConfigurationError(f"{folder} holds a {config.get('_class_name')}, but must hold a {class_name}.")
    transformer = _empty(SiTTransformer2DModel, folder / "transformer")
    _check_representable(transformer)
    return transformer


def _official_state(
    folder: Path, transformer: SiTTransformer2DModel, names: list[str], dtype: torch.dtype | None, raw: bool
) -> dict[str, torch.Tensor]:
    """Transformer and projectors under official names, with the trained or the averaged weights."""
    state = to_official(_filled(transformer, folder, "transformer", dtype, raw))
    for number, name in enumerate(names):
        path = folder / "projectors" / name
        class_name = saved_class_name(path)
        if class_name not in PROJECTOR_CLASSES:
            raise ConfigurationError(
                f"the projector {path} is {class_name or 'of an unknown class'}, which REPA and iREPA do not have: "
                "move its folder away."
            )
        projector = _empty(PROJECTOR_CLASSES[class_name], path)
        state |= to_official_names(number, _filled(projector, folder, f"projectors/{name}", dtype, raw))
    return state


def _empty(cls: Any, folder: Path) -> Any:
    """The model that a folder's configuration describes, without memory for its weights."""
    try:
        with torch.device("meta"):
            return cls.from_config(read_json(folder / CONFIG_FILE))
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{folder} describes no model ({one_line(error)}): change `source`.") from None


def _filled(model: Any, folder: Path, name: str, dtype: torch.dtype | None, raw: bool) -> Any:
    """The model with each weight in the dtype it is stored in, which `from_pretrained` would change to one."""
    weights = {key: value.to(dtype or value.dtype) for key, value in read_weights(folder, name, raw=raw).items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ConfigurationError(
            f"the weights of {folder / name} do not fit its configuration ({one_line(error)}): give a complete "
            "`source`."
        ) from None
    return model


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
