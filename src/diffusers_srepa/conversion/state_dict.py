"""From the content of a checkpoint file to one state dict under plain names."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusers_srepa.errors import ConfigurationError


WEIGHTS = ("ema", "model")
# What DistributedDataParallel and torch.compile put between the parts of a name.
_WRAPPERS = {"module", "_orig_mod"}


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

    Args:
        checkpoint: what [`read_checkpoint`] returned.
        weights (`str`, *optional*): "ema" or "model"; by default the average `ema`, or `model` in a file that has no
            average.

    Raises:
        ConfigurationError: the checkpoint is no dict of tensors, lacks the weights asked for, or has tensors that are
            not dense, not floating point or not finite.
    """
    if not isinstance(checkpoint, Mapping):
        raise ConfigurationError(
            f"the checkpoint holds a {type(checkpoint).__name__}, but must hold a dict of weights: change "
            "--checkpoint."
        )
    if weights not in (None, *WEIGHTS):
        raise ConfigurationError(f"--weights is {weights!r}, but must be ema or model.")
    present = [name for name in WEIGHTS if isinstance(checkpoint.get(name), Mapping)]
    if not present:
        if weights is not None:
            raise ConfigurationError(
                f"--weights {weights} was given, but the checkpoint is one bare state dict: leave the option out."
            )
        return Weights(_check_state(strip_wrappers(checkpoint)))
    if weights is not None and weights not in present:
        raise ConfigurationError(f"the checkpoint has no {weights!r} weights: use --weights {present[0]}.")
    source = weights or present[0]
    return Weights(
        _check_state(strip_wrappers(checkpoint[source])),
        source=source,
        arguments=_arguments(checkpoint.get("args")),
        steps=_steps(checkpoint.get("steps")),
    )


def strip_wrappers(state: Mapping[Any, Any]) -> dict[str, Any]:
    """A new dict whose names lack every part `module` and `_orig_mod`.

    Raises:
        ConfigurationError: a name is no string, or two names become the same one.
    """
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
        raise ConfigurationError("the checkpoint has no weights: change --checkpoint.")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ConfigurationError(
            f"the checkpoint has entries that are no tensors ({name_some(others)}), so it is neither a state dict nor "
            "a dict with 'model' or 'ema': change --checkpoint."
        )
    for name, value in state.items():
        if value.layout != torch.strided or not value.dtype.is_floating_point:
            raise ConfigurationError(
                f"the tensor {name} has dtype {value.dtype} and layout {value.layout}, but must be dense and of a "
                "floating point type."
            )
        if value.is_meta:
            raise ConfigurationError(
                f"the tensor {name} was saved from the meta device and has no values: change --checkpoint."
            )
    return {name: value.detach() for name, value in state.items()}


def check_finite(
    state: Mapping[str, torch.Tensor], remedy: str = "use another checkpoint of the run, or --weights"
) -> None:
    """Refuse weights that are not finite, as a diverged run leaves them.

    Args:
        state (`Mapping[str, torch.Tensor]`): the weights by name.
        remedy (`str`): end of the message.

    Raises:
        ConfigurationError: some are not; the tensor is named.
    """
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
