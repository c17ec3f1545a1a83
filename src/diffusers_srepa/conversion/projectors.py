"""The projectors of official checkpoints: found by their names, told apart by their shapes, kept beside the pipeline.

REPA and REG write `projectors.{k}.{0,2,4}`, iREPA `projectors.{k}.projection_layer` for a linear or convolutional
projector and `projectors.{k}.projection_layer.{0,2,4}` for an MLP; `k` counts the vision encoders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from diffusers_srepa.alignment.projectors import ConvProjector, LinearProjector, MLPProjector
from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.conversion.read import name_some
from diffusers_srepa.errors import ConfigurationError


PREFIX = "projectors."
_WRAPPER = "projection_layer."
_NAME = re.compile(r"projectors\.(\d+)\.(.+)")
_MLP_LAYERS = ("0", "2", "4")
_PROJECTOR_NAME = re.compile(r"[A-Za-z0-9_-]+")


def split_projectors(state: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """Take the projectors out of a state dict, in place: by number, under the names inside one projector.

    Raises:
        ConfigurationError: a name without a number, or numbers with a gap.
    """
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name in [name for name in state if name.startswith(PREFIX)]:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigurationError(f"the checkpoint has the unknown {name}, which names no projector by number.")
        found.setdefault(int(match[1]), {})[match[2]] = state.pop(name)
    if sorted(found) != list(range(len(found))):
        raise ConfigurationError(f"the checkpoint has the projectors {sorted(found)}, but they must count from 0.")
    return dict(sorted(found.items()))


def has_irepa_names(projectors: Mapping[int, Mapping[str, torch.Tensor]]) -> bool:
    """Whether a projector is written as iREPA does."""
    return any(name.startswith(_WRAPPER) for state in projectors.values() for name in state)


def name_projectors(count: int, names: Sequence[str] | None) -> list[str]:
    """Folder names for `count` projectors: the given ones, else "default", "projector_1", "projector_2" and so on.

    Raises:
        ConfigurationError: too many or too few names, or names that cannot be those of folders and modules.
    """
    if names is None:
        return [DEFAULT if number == 0 else f"projector_{number}" for number in range(count)]
    if len(names) != count or len(set(names)) != count:
        raise ConfigurationError(
            f"`projector_names` gives {len(names)} names, but the checkpoint has {count} projectors: give each a name "
            "of its own."
        )
    for name in names:
        if not _PROJECTOR_NAME.fullmatch(name):
            raise ConfigurationError(
                f"`projector_names` has {name!r}, but a name may have letters, digits, '-' and '_' only."
            )
    return list(names)


def build_projector(
    number: int, state: Mapping[str, torch.Tensor], dim: int, dtype: torch.dtype | None = None
) -> nn.Module:
    """A projector with the weights of `state`.

    Args:
        number (`int`): its number, for messages.
        state (`Mapping[str, torch.Tensor]`): its weights under the names inside the projector.
        dim (`int`): width of the student's tokens.
        dtype (`torch.dtype`, *optional*): precision, by default that of each tensor.

    Raises:
        ConfigurationError: names or shapes that no projector has.
    """
    plain = {name.removeprefix(_WRAPPER): value if dtype is None else value.to(dtype) for name, value in state.items()}
    where = f"the projector {PREFIX}{number}"
    if set(plain) == {"weight", "bias"}:
        return _single_layer(where, plain, dim)
    expected = {f"{layer}.{kind}" for layer in _MLP_LAYERS for kind in ("weight", "bias")}
    if set(plain) != expected:
        missing, unknown = expected - set(plain), set(plain) - expected
        what = f"lacks {name_some(missing)}" if missing else f"has the unknown {name_some(unknown)}"
        raise ConfigurationError(f"{where} {what}: it is none of REPA's and iREPA's projectors.")
    first, last = plain["0.weight"], plain["4.weight"]
    if first.ndim != 2 or last.ndim != 2:
        raise ConfigurationError(f"{where} has weights of shape {tuple(first.shape)}, which no linear layer has.")
    with torch.device("meta"):
        projector = MLPProjector(first.shape[1], last.shape[0], hidden_dim=first.shape[0])
    return _fill(where, projector, {f"layers.{name}": value for name, value in plain.items()}, dim)


def _single_layer(where: str, plain: Mapping[str, torch.Tensor], dim: int) -> nn.Module:
    weight = plain["weight"]
    is_conv = weight.ndim == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] % 2 == 1
    if not is_conv and weight.ndim != 2:
        raise ConfigurationError(
            f"{where} has a weight of shape {tuple(weight.shape)}, but iREPA's are linear or convolutions of an odd "
            "square kernel."
        )
    with torch.device("meta"):
        if is_conv:
            projector: nn.Module = ConvProjector(weight.shape[1], weight.shape[0], kernel_size=weight.shape[2])
        else:
            projector = LinearProjector(weight.shape[1], weight.shape[0])
    prefix = "conv" if is_conv else "linear"
    return _fill(where, projector, {f"{prefix}.{name}": value for name, value in plain.items()}, dim)


def _fill(where: str, projector: nn.Module, state: Mapping[str, torch.Tensor], dim: int) -> nn.Module:
    for name, value in projector.state_dict().items():
        if value.shape != state[name].shape:
            raise ConfigurationError(
                f"{where} has {name.split('.', 1)[1]} of shape {tuple(state[name].shape)}, but its other layers "
                f"require {tuple(value.shape)}."
            )
    in_dim = projector.config["in_dim"]  # type: ignore[index]
    if in_dim != dim:
        raise ConfigurationError(f"{where} takes tokens of width {in_dim}, but the transformer's have {dim}.")
    # Cloned, because safetensors refuses tensors that share memory.
    copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    projector.load_state_dict(copies, assign=True)
    return projector


def to_official_names(number: int, projector: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a projector under REPA's names, or iREPA's for a linear or convolutional one.

    Raises:
        ConfigurationError: a projector of another class.
    """
    prefix = f"{PREFIX}{number}."
    if isinstance(projector, MLPProjector):
        old, new = "layers.", prefix
    elif isinstance(projector, LinearProjector | ConvProjector):
        old, new = ("linear." if isinstance(projector, LinearProjector) else "conv."), prefix + _WRAPPER
    else:
        raise ConfigurationError(
            f"a projector is a {type(projector).__name__}, which REPA and iREPA do not have: move its folder away."
        )
    return {new + name.removeprefix(old): value for name, value in projector.state_dict().items()}
