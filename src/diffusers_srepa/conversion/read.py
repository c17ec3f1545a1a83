"""Reading an official checkpoint: its file, without running anything in it; its weights; its run's arguments."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffusers_srepa.errors import ConfigurationError, one_line


_ZIP = b"PK\x03\x04"
# `torch.save` before version 1.6 wrote a bare pickle, which starts with its protocol.
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
# How PyTorch's restricted unpickler names what it refuses to load or call.
_REFUSED = re.compile(r"(?:GLOBAL|class|function) <?(?:class |function )?'?([A-Za-z_][\w.]*\.\w+)")
WEIGHTS = ("ema", "model")
# What DistributedDataParallel and torch.compile put between the parts of a name.
_WRAPPERS = {"module", "_orig_mod"}
# Options that one of the two trainers has and the other does not. Both have `path_type` and `prediction`, whose values
# differ: Linear, GVP, VP and velocity, score, noise in SiT; linear, cosine and v in REPA and its descendants.
_SIT_OPTIONS = {"loss_weight", "train_eps", "sample_eps"}
_REPA_OPTIONS = {"enc_type", "proj_coeff", "encoder_depth"}
_SIT_PREDICTIONS = {"velocity", "score", "noise"}
_PATHS = {"linear": "linear", "gvp": "cosine", "cosine": "cosine"}


def read_checkpoint(path: str | Path) -> Any:
    """The content of a `.pt`, `.pth`, `.bin` or `.safetensors` file, tensors on the CPU.

    Files are told apart by their first bytes, not by their name. PyTorch files are read by `weights_only=True` with
    `argparse.Namespace` as the one class allowed beyond tensors and plain values: the official trainers store their
    arguments as one. Zip files are mapped, so that only what is used comes into memory.

    Raises:
        ConfigurationError: there is no such file, it is empty, truncated or of another kind, or it holds objects that
            only unpickling could restore.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(
            f"{path} is a folder, but `checkpoint` must be a file (.pt, .pth, .bin, .safetensors)."
        )
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}: change `checkpoint`.")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ConfigurationError(f"the file {path} is empty: change `checkpoint`, or download it again.")
    if head.startswith(_ZIP):
        return _load_torch(path, mmap=True)
    if head.startswith(_PICKLE):
        return _load_torch(path, mmap=False)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ConfigurationError(_damage(path, error)) from None
    text = head.decode("utf-8", errors="replace")
    # The last character may have been cut in two.
    readable = all(character.isprintable() or character.isspace() for character in text.rstrip("\ufffd"))
    kind = "a text file" if readable else "a file of an unknown kind"
    raise ConfigurationError(f"{path} is {kind}, neither a PyTorch nor a safetensors file: change `checkpoint`.")


def _load_torch(path: Path, mmap: bool) -> Any:
    try:
        # A file object, because torch.load takes a path that ends in .safetensors for such a file.
        with (
            path.open("rb") as file,
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            source = str(path) if mmap and path.suffix != ".safetensors" else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=isinstance(source, str))
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        raise ConfigurationError(_refusal(path, refused[1] if refused else "a pickle of another kind")) from None
    # A damaged pickle stops anywhere in its program, and so with almost any error.
    except Exception as error:
        is_program = isinstance(error, RuntimeError) and "TorchScript" in str(error)
        raise ConfigurationError(
            _refusal(path, "a TorchScript program") if is_program else _damage(path, error)
        ) from None


def _refusal(path: Path, what: str) -> str:
    return (
        f"{path} holds {what}, which only unpickling could restore, and that can run code from the file: give a "
        "checkpoint of tensors and plain values, such as a file saved by torch.save(model.state_dict())."
    )


def _damage(path: Path, error: Exception) -> str:
    reason = one_line(one_line(error).split(". ")[0], 160)
    return f"{path} cannot be read ({reason}): it is truncated, damaged or no checkpoint; download it again."


@dataclass
class Weights:
    """The weights of a checkpoint, and what the file says about them.

    Args:
        state (`dict[str, torch.Tensor]`): official names, without the prefixes of wrappers.
        source (`str`, *optional*): "ema" or "model"; None for a bare state dict.
        arguments (`dict[str, Any]`): the arguments of the run that the official trainers store; may be empty.
        steps (`int`, *optional*): training steps, if the file has them.
    """

    state: dict[str, torch.Tensor]
    source: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None


def select_weights(checkpoint: Any, weights: str | None = None) -> Weights:
    """One set of weights of a checkpoint: a dict with `model` and/or `ema`, or a bare state dict.

    `weights` is "ema" or "model"; by default the average `ema`, or `model` in a file that has no average. Refused are
    tensors that are not dense or not floating point.
    """
    if not isinstance(checkpoint, Mapping):
        raise ConfigurationError(
            f"the checkpoint holds a {type(checkpoint).__name__}, but must be a dict of weights: change `checkpoint`."
        )
    if weights not in (None, *WEIGHTS):
        raise ConfigurationError(f"`weights` is {weights!r}, but must be ema or model.")
    present = [name for name in WEIGHTS if isinstance(checkpoint.get(name), Mapping)]
    if not present:
        if weights is not None:
            raise ConfigurationError(
                f"`weights` {weights} was given, but the checkpoint is one bare state dict: leave the option out."
            )
        return Weights(_check_state(strip_wrappers(checkpoint)))
    if weights is not None and weights not in present:
        raise ConfigurationError(f"the checkpoint has no {weights!r} weights: use `weights` {present[0]}.")
    source = weights or present[0]
    return Weights(
        _check_state(strip_wrappers(checkpoint[source])),
        source=source,
        arguments=_arguments(checkpoint.get("args")),
        steps=_steps(checkpoint.get("steps")),
    )


def strip_wrappers(state: Mapping[Any, Any]) -> dict[str, Any]:
    """A new dict whose names lack every part `module` and `_orig_mod`."""
    stripped: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ConfigurationError(f"the checkpoint has the name {name!r}, but a state dict has names of text.")
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in stripped:
            raise ConfigurationError(f"the checkpoint has two tensors for {plain}, one of them under the name {name}.")
        stripped[plain] = value
    return stripped


def name_some(names: Iterable[str]) -> str:
    """Up to three names, sorted, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def _check_state(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    if not state:
        raise ConfigurationError("the checkpoint has no weights: change `checkpoint`.")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ConfigurationError(
            f"the checkpoint has entries that are no tensors ({name_some(others)}), so it is neither a state dict nor "
            "a dict with 'model' or 'ema': change `checkpoint`."
        )
    for name, value in state.items():
        if value.layout != torch.strided or not value.dtype.is_floating_point:
            raise ConfigurationError(
                f"the tensor {name} has dtype {value.dtype} and layout {value.layout}, but must be dense and of a "
                "floating point type."
            )
        if value.is_meta:
            raise ConfigurationError(
                f"the tensor {name} was saved from the meta device and has no values: change `checkpoint`."
            )
    return {name: value.detach() for name, value in state.items()}


def check_finite(
    state: Mapping[str, torch.Tensor], remedy: str = "use another checkpoint of the run, or `weights`"
) -> None:
    """Refuse weights that are not finite, as a diverged run leaves them; `remedy` ends the sentence."""
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise ConfigurationError(f"the tensor {name} has values that are not finite: {remedy}.")


def _arguments(args: Any) -> dict[str, Any]:
    if isinstance(args, argparse.Namespace):
        return dict(vars(args))
    return {str(name): value for name, value in args.items()} if isinstance(args, Mapping) else {}


def _steps(steps: Any) -> int | None:
    if isinstance(steps, torch.Tensor) and steps.numel() == 1 and not steps.is_meta:
        steps = steps.item()
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else None


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Args:
        original (`str`, *optional*): "sit" or "repa" (which stands for iREPA and REG too).
        path_type (`str`, *optional*): "linear" or "cosine".
        num_classes (`int`, *optional*): number of classes.
        class_dropout_prob (`float`, *optional*): how often labels were dropped.
        encoder_depth (`int`, *optional*): block whose output the projectors read, counted from 1.
    """

    original: str | None = None
    path_type: str | None = None
    num_classes: int | None = None
    class_dropout_prob: float | None = None
    encoder_depth: int | None = None


def read_arguments(arguments: Mapping[str, Any]) -> RunFacts:
    """The facts in a run's arguments; entries of an unexpected type are passed over.

    Raises:
        ConfigurationError: a model that is no velocity model of the linear or cosine (GVP) path.
    """
    _check_prediction(arguments.get("prediction"))
    return RunFacts(
        original=_original(arguments),
        path_type=_path_type(arguments.get("path_type")),
        num_classes=_positive_int(arguments.get("num_classes")),
        class_dropout_prob=_probability(arguments.get("cfg_prob")),
        encoder_depth=_positive_int(arguments.get("encoder_depth")),
    )


def _original(arguments: Mapping[str, Any]) -> str | None:
    # Compared as text: a file may hold anything there, also what cannot be hashed.
    path, prediction = str(arguments.get("path_type")), str(arguments.get("prediction"))
    is_sit = bool(_SIT_OPTIONS & set(arguments)) or path in ("Linear", "GVP", "VP") or prediction in _SIT_PREDICTIONS
    is_repa = bool(_REPA_OPTIONS & set(arguments))
    return None if is_sit == is_repa else "sit" if is_sit else "repa"


def _check_prediction(prediction: Any) -> None:
    if prediction in ("score", "noise"):
        raise ConfigurationError(
            f"the checkpoint is a model of the {prediction} (args.prediction), but only velocity models can be "
            "converted: another prediction would have to be transformed at each time, which no weights can do."
        )
    if isinstance(prediction, str) and prediction not in (*_SIT_PREDICTIONS, "v"):
        raise ConfigurationError(
            f"the checkpoint's args.prediction is {prediction!r}, but only velocity models can be converted."
        )


def _path_type(path: Any) -> str | None:
    if not isinstance(path, str):
        return None
    if path.lower() == "vp":
        raise ConfigurationError(
            "the checkpoint was trained on the VP path (args.path_type), but only the linear and the cosine (GVP) "
            "path can be converted: reversed in time, the VP path is none that the schedulers know."
        )
    if path.lower() not in _PATHS:
        raise ConfigurationError(
            f"the checkpoint's args.path_type is {path!r}, but only Linear and GVP (cosine) paths can be converted."
        )
    return _PATHS[path.lower()]


def _positive_int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _probability(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 else None
