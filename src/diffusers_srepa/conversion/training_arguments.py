"""What the arguments of an official training run say about its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers_srepa.errors import ConfigurationError


# Options that one of the two trainers has and the other does not. Both have `path_type` and `prediction`, whose values
# differ: Linear, GVP, VP and velocity, score, noise in SiT; linear, cosine and v in REPA and its descendants.
_SIT_OPTIONS = {"loss_weight", "train_eps", "sample_eps"}
_REPA_OPTIONS = {"enc_type", "proj_coeff", "encoder_depth"}
_SIT_PREDICTIONS = {"velocity", "score", "noise"}
_PATHS = {"linear": "linear", "gvp": "cosine", "cosine": "cosine"}


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
    prediction = arguments.get("prediction")
    path = arguments.get("path_type")
    _check_prediction(prediction)
    original = _original(arguments)
    return RunFacts(
        original=original,
        path_type=_path_type(path),
        num_classes=_positive_int(arguments.get("num_classes")),
        class_dropout_prob=_probability(arguments.get("cfg_prob")),
        encoder_depth=_positive_int(arguments.get("encoder_depth")),
    )


def _original(arguments: Mapping[str, Any]) -> str | None:
    # Compared as text: a file may hold anything there, also what cannot be hashed.
    path, prediction = str(arguments.get("path_type")), str(arguments.get("prediction"))
    is_sit = bool(_SIT_OPTIONS & set(arguments)) or path in ("Linear", "GVP", "VP") or prediction in _SIT_PREDICTIONS
    is_repa = bool(_REPA_OPTIONS & set(arguments))
    if is_sit == is_repa:
        return None
    return "sit" if is_sit else "repa"


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
