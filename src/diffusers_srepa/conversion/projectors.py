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
from diffusers_srepa.files import check_name


PREFIX = "projectors."
_WRAPPER = "projection_layer."
_NAME = re.compile(r"projectors\.(\d+)\.(.+)")
_MLP_NAMES = {f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
# What our names begin with, and the official ones behind the number.
_PREFIXES = {MLPProjector: ("layers.", ""), LinearProjector: ("linear.", _WRAPPER), ConvProjector: ("conv.", _WRAPPER)}
PROJECTOR_CLASSES = {projector_class.__name__: projector_class for projector_class in _PREFIXES}


def split_projectors(state: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """Take the projectors out of a state dict, in place: by number, under the names inside one projector."""
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
    """Folder names for `count` projectors: the given ones, else "default", "projector_1", "projector_2" and so on."""
    if names is None:
        return [DEFAULT if number == 0 else f"projector_{number}" for number in range(count)]
    if len(names) != count or len(set(names)) != count:
        raise ConfigurationError(
            f"`projector_names` gives {len(names)} names, but the checkpoint has {count} projectors: give each a name "
            "of its own."
        )
    for name in names:
        check_name("a name in `projector_names`", name)
    return list(names)


def build_projector(
    number: int, state: Mapping[str, torch.Tensor], dim: int, dtype: torch.dtype | None = None
) -> nn.Module:
    """The `number`-th projector, for tokens of width `dim`, with the weights of `state`.

    `state` has the names inside the projector; `dtype` is the precision, by default that of each tensor.
    """
    plain = {name.removeprefix(_WRAPPER): value if dtype is None else value.to(dtype) for name, value in state.items()}
    where = f"the projector {PREFIX}{number}"
    if set(plain) == {"weight", "bias"}:
        return _single_layer(where, plain, dim)
    if set(plain) != _MLP_NAMES:
        missing, unknown = _MLP_NAMES - set(plain), set(plain) - _MLP_NAMES
        what = f"lacks {name_some(missing)}" if missing else f"has the unknown {name_some(unknown)}"
        raise ConfigurationError(f"{where} {what}: it is none of REPA's and iREPA's projectors.")
    first, last = plain["0.weight"], plain["4.weight"]
    if first.ndim != 2 or last.ndim != 2:
        raise ConfigurationError(f"{where} has weights of shape {tuple(first.shape)}, which no linear layer has.")
    with torch.device("meta"):
        projector = MLPProjector(first.shape[1], last.shape[0], hidden_dim=first.shape[0])
    return _fill(where, projector, plain, dim)


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
    return _fill(where, projector, plain, dim)


def _fill(where: str, projector: nn.Module, plain: Mapping[str, torch.Tensor], dim: int) -> nn.Module:
    prefix, empty = _PREFIXES[type(projector)][0], projector.state_dict()
    for name, value in plain.items():
        expected = empty[prefix + name].shape
        if value.shape != expected:
            raise ConfigurationError(
                f"{where} has {name} of shape {tuple(value.shape)}, but its other layers require {tuple(expected)}."
            )
    in_dim = projector.config["in_dim"]  # type: ignore[index]
    if in_dim != dim:
        raise ConfigurationError(f"{where} takes tokens of width {in_dim}, but the transformer's have {dim}.")
    # Cloned, because safetensors refuses tensors that share memory.
    copies = {prefix + name: value.clone(memory_format=torch.contiguous_format) for name, value in plain.items()}
    projector.load_state_dict(copies, assign=True)
    return projector


def to_official_names(number: int, projector: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a projector under REPA's names, or iREPA's for a linear or convolutional one."""
    old, new = _PREFIXES[type(projector)]
    state = projector.state_dict()
    return {f"{PREFIX}{number}.{new}{name.removeprefix(old)}": value for name, value in state.items()}
