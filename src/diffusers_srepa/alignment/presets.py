"""The methods of the paper by name: which terms, weights, projector and teacher transform each one means.

The only home of these numbers, which come from REPA (arXiv 2410.06940), iREPA (arXiv 2512.10794), REG
(arXiv 2507.01467) and from Tables 3, 7 and 8 of the sREPA paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from diffusers_srepa.errors import ConfigurationError, close_matches


@dataclass(frozen=True)
class MethodPreset:
    """One method, its parts as the literals that `build.py` understands.

    Args:
        terms (`Mapping[str, Mapping]`): alignment terms by name, `{"objective": literal, "weight": number}`.
        projector (`Mapping`, *optional*): literal of the projector.
        target_transform (`Mapping`, *optional*): literal of what is done to the teacher's tokens first, for all terms.
        class_token_weight (`float`, *optional*): weight of the class token's own flow loss (REG); None without one.
    """

    terms: Mapping[str, Mapping[str, Any]]
    projector: Mapping[str, Any] | None = None
    target_transform: Mapping[str, Any] | None = None
    class_token_weight: float | None = None


def _terms(**weights: float) -> dict[str, dict[str, Any]]:
    return {name: {"objective": _OBJECTIVES[name], "weight": weight} for name, weight in weights.items()}


_OBJECTIVES: dict[str, dict[str, Any]] = {
    "cosine": {"name": "cosine"},
    "gram_mse": {"name": "gram_mse"},
    "gram_kl": {"name": "gram_kl", "tau_teacher": 0.2, "tau_student": 0.2},
}
_MLP = {"name": "mlp", "hidden_dim": 2048}
_CONV = {"name": "conv", "kernel_size": 3}
_SPATIAL_NORM = {"name": "spatial_norm", "alpha": 0.6}
_REG_WEIGHT = 0.03

METHOD_PRESETS: Mapping[str, MethodPreset] = MappingProxyType(
    {
        "sit": MethodPreset(terms={}),
        "repa": MethodPreset(_terms(cosine=0.5), _MLP),
        "irepa": MethodPreset(_terms(cosine=1.0), _CONV, _SPATIAL_NORM),
        "reg": MethodPreset(_terms(cosine=0.5), _MLP, class_token_weight=_REG_WEIGHT),
        "srepa-mse": MethodPreset(_terms(cosine=1.0, gram_mse=2.0), _MLP),
        "srepa-kl": MethodPreset(_terms(cosine=1.0, gram_kl=0.5), _MLP),
        # The paper's Table 3 leaves the weight open; these give the values of its Table 9 after 400k steps.
        "structure-mse": MethodPreset(_terms(gram_mse=4.0), _MLP),
        "structure-kl": MethodPreset(_terms(gram_kl=0.5), _MLP),
        "irepa+srepa": MethodPreset(_terms(cosine=1.0, gram_mse=2.0), _CONV, _SPATIAL_NORM),
        "reg+srepa": MethodPreset(_terms(cosine=0.5, gram_mse=2.0), _MLP, class_token_weight=_REG_WEIGHT),
    }
)

DEFAULT_PRESET = "srepa-mse"

_DEPTHS = {(12, 768): 4, (24, 1024): 8, (28, 1152): 8}


def get_preset(name: str) -> MethodPreset:
    """The preset called `name`.

    Raises:
        ConfigurationError: there is none; all names and the closest ones are given.
    """
    if name not in METHOD_PRESETS:
        raise ConfigurationError(
            f"the alignment preset {name!r} is not one of {', '.join(METHOD_PRESETS)}: "
            f"{close_matches(str(name), METHOD_PRESETS).rstrip('?')}."
        )
    return METHOD_PRESETS[name]


def alignment_preset(name: str) -> dict[str, Any]:
    """As `get_preset`, in fresh nested plain values, one entry per field of `MethodPreset`, to be merged over."""
    return deepcopy(vars(get_preset(name)))


def default_depth(num_layers: int, hidden_size: int | None = None) -> int:
    """The block, counted from 1, whose output is aligned by default: 4 for B, 8 for L and XL, else a third.

    Without the width of the tokens, `hidden_size`, the number of blocks alone tells the size.
    """
    if num_layers < 1:
        raise ConfigurationError(f"the transformer has {num_layers} blocks, but alignment needs at least 1.")
    for (layers, width), depth in _DEPTHS.items():
        if num_layers == layers and hidden_size in (None, width):
            return depth
    return max(1, num_layers // 3)
