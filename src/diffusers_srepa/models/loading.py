"""Reading trained models back: from a pipeline's folder, from a checkpoint of a run, or from the Hub.

A pipeline has `transformer/` and, beside it, `projectors/<name>/`, each as `save_pretrained` writes it. So has the
folder `checkpoint-<step>` of a run, whose `state.json` names its format:

- format 2: the folders hold the averaged weights (EMA), `raw.safetensors` the trained ones as
  `student.<module>.<parameter>`;
- format 1: the folders hold the trained weights, `ema.safetensors` the averaged ones as `<module>.<parameter>`;

where `<module>` is `transformer` or `projectors.<name>`. Everything here reads the averaged weights unless told
otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from diffusers_srepa.errors import ConfigurationError, one_line
from diffusers_srepa.hub_errors import FETCH_ERRORS, explain_failure
from diffusers_srepa.models.presets import transformer_class


TRANSFORMER = "transformer"
PROJECTORS = "projectors"

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_STATE_FILE = "state.json"
# By format of a checkpoint: the file of the other weights, those that are not in the modules' own folders.
_OTHER_WEIGHTS = {1: "ema.safetensors", 2: "raw.safetensors"}
_UNREADABLE = (*FETCH_ERRORS, RuntimeError, TypeError, KeyError, SafetensorError)


def find_folder(source: str | Path, patterns: Sequence[str] = (f"{TRANSFORMER}/*", f"{PROJECTORS}/*")) -> Path:
    """The local folder of a pipeline or checkpoint, its transformer and projectors fetched if it is on the Hub.

    Args:
        source (`str` or `Path`): folder of a pipeline or of a checkpoint, or Hub id of a pipeline.
        patterns (`Sequence[str]`): which files are fetched.

    Raises:
        ConfigurationError: there is none, or it has no transformer.
    """
    folder = Path(source)
    if folder.is_file():
        raise ConfigurationError(f"`source` {source} is a file, but must be the folder or Hub id of a pipeline.")
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=list(patterns)))
        except FETCH_ERRORS as error:
            raise ConfigurationError(f"the pipeline `source` {source} {explain_failure(error, 'source')}.") from None
    if not (folder / TRANSFORMER / _CONFIG_FILE).is_file():
        raise ConfigurationError(
            f"`source` {source} has no folder {TRANSFORMER} with a {_CONFIG_FILE}: give the folder of a pipeline or a "
            "checkpoint."
        )
    return folder


def read_transformer_config(source: str | Path) -> dict[str, Any]:
    """The configuration of a transformer, `_class_name` included; from the Hub only this file is fetched.

    Args and errors as of `load_transformer`.
    """
    folder = find_folder(source, [f"{TRANSFORMER}/{_CONFIG_FILE}"])
    config = read_json(folder / TRANSFORMER / _CONFIG_FILE)
    _transformer_class(source, config)
    return config


def load_transformer(source: str | Path, *, sample_size: int | tuple[int, int] | None = None) -> Any:
    """A saved transformer with its averaged weights, in evaluation mode.

    Args:
        source (`str` or `Path`): folder of a pipeline or of a checkpoint, or Hub id of a pipeline.
        sample_size (`int` or `tuple[int, int]`, *optional*): native size of the latents, by default the saved one. All
            weights stay the same at another size, only the table of positions is another.

    Raises:
        ConfigurationError: there is none, it is of a class that is not registered, or its files are damaged.
    """
    config = read_transformer_config(source)
    cls = _transformer_class(source, config)
    try:
        transformer = cls.from_pretrained(source, subfolder=TRANSFORMER)
        if _checkpoint_format(Path(source)) == 1:
            transformer.load_state_dict(read_weights(Path(source), TRANSFORMER))
        if sample_size not in (None, config.get("sample_size")):
            weights = {name: value for name, value in transformer.state_dict().items() if name != "pos_embed"}
            transformer = cls.from_config({**config, "sample_size": sample_size})
            transformer.load_state_dict(weights, strict=False)
    except _UNREADABLE as error:
        raise ConfigurationError(f"the transformer of `source` {source} {explain_failure(error, 'source')}.") from None
    return transformer.eval()


def projector_names(folder: Path) -> list[str]:
    """Names of the projectors of a pipeline or checkpoint, in order of the alphabet; empty if it has none."""
    parent = folder / PROJECTORS
    return sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def has_raw_weights(folder: Path) -> bool:
    """Whether the folder is a checkpoint's, which holds the trained weights too."""
    return _checkpoint_format(folder) is not None


def read_weights(folder: Path, module: str, *, raw: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of a saved module, each tensor in the dtype that it is stored in.

    Args:
        folder (`Path`): folder of a pipeline or of a checkpoint, as `find_folder` returns it.
        module (`str`): `"transformer"`, or `"projectors/<name>"`.
        raw (`bool`): the trained weights instead of their average; see `has_raw_weights`.

    Raises:
        ConfigurationError: files that are missing or damaged, or a checkpoint of an unknown format.
    """
    saved_format = _checkpoint_format(folder)
    try:
        # What is no parameter, such as a table of positions, is in the module's own folder alone.
        state = _read_folder(folder / module)
        if saved_format is not None and raw == (saved_format == 2):
            state |= _read_module(folder / _OTHER_WEIGHTS[saved_format], module.replace("/", "."))
    except _UNREADABLE as error:
        raise ConfigurationError(
            f"the weights of {folder / module} cannot be loaded ({one_line(error)}): give a complete `source`."
        ) from None
    return state


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file of a pipeline or checkpoint."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} is no valid JSON ({one_line(error)}): change `source`.") from None


def _transformer_class(source: str | Path, config: dict[str, Any]) -> Any:
    try:
        return transformer_class(str(config.get("_class_name")))
    except ConfigurationError as error:
        raise ConfigurationError(f"`source` {source} holds no transformer of a known class: {error}") from None


def _checkpoint_format(folder: Path) -> int | None:
    """The format of a checkpoint's folder; None for a pipeline's."""
    file = folder / _STATE_FILE
    if not file.is_file():
        return None
    found = read_json(file).get("format")
    if found not in _OTHER_WEIGHTS:
        raise ConfigurationError(
            f"the checkpoint {folder} has format {found}, but must have 1 or 2: change `source`, or update this "
            "package."
        )
    return found


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file, or of the shards that an index lists."""
    index = folder / f"{_WEIGHTS_FILE}.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [_WEIGHTS_FILE]
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= load_file(folder / file)
    return state


def _read_module(file: Path, module: str) -> dict[str, torch.Tensor]:
    """The tensors of a module, which may itself be a part of a trained one: `transformer` or `student.transformer`."""
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        tops = dict.fromkeys(name.partition(".")[0] for name in names)
        for prefix in (f"{module}.", *(f"{top}.{module}." for top in tops)):
            found = [name for name in names if name.startswith(prefix)]
            if found:
                return {name.removeprefix(prefix): tensors.get_tensor(name) for name in found}
    raise ValueError(f"{file.name} has no tensors of {module}")
