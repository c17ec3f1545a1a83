"""The transformers that can be trained, found by the name of their class or of one of their sizes.

A transformer is a `ModelMixin` with `ConfigMixin` and `CacheMixin`:

- its configuration has `sample_size`, `patch_size`, `in_channels`, `num_classes`, `class_dropout_prob`, perhaps
  `out_channels` and `class_token_dim`, and `timestep_scale` if timesteps are not 1000 t;
- `forward(hidden_states, timestep, class_labels, class_drop_mask=None, attention_kwargs=None, return_dict=True)`, the
  last four by keyword, returns the velocity as `sample` of an output or first in a tuple;
- `null_class_label` is the label of the null class, None without one; `inner_dim` the width of its tokens; its blocks
  are in a list called `transformer_blocks` or `blocks`, and `_no_split_modules` names their class, for FSDP2;
- `PRESETS` holds its sizes by name as keyword arguments, for `model.preset`.

A class of another package needs no entry here: pass an object to the trainer, or `register_transformer` the class.
"""

from __future__ import annotations

import importlib
from typing import Any

from diffusers_srepa.errors import ConfigurationError, close_matches


# A class, or the module that holds it, which is imported on first use.
_TRANSFORMERS: dict[str, Any] = {"SiTTransformer2DModel": "diffusers_srepa.models.transformer_sit"}


def register_transformer(transformer_class: type) -> type:
    """Let `transformer_class` be found by its own name and by those of its `PRESETS`; usable as a decorator."""
    _TRANSFORMERS[transformer_class.__name__] = transformer_class
    return transformer_class


def transformer_class(class_name: str) -> Any:
    """The transformer class of that name; a `ConfigurationError` if there is none."""
    if class_name not in _TRANSFORMERS:
        raise ConfigurationError(
            f"there is no transformer class {class_name!r}, {close_matches(class_name, _TRANSFORMERS)}"
        )
    found = _TRANSFORMERS[class_name]
    return getattr(importlib.import_module(found), class_name) if isinstance(found, str) else found


def find_preset(name: str) -> tuple[Any, dict[str, Any]]:
    """The transformer class that has a size called `name`, and that size as keyword arguments."""
    known: list[str] = []
    for class_name in _TRANSFORMERS:
        found = transformer_class(class_name)
        if name in found.PRESETS:
            return found, dict(found.PRESETS[name])
        known += found.PRESETS
    raise ConfigurationError(f"there is no model preset {name!r}, {close_matches(name, known)} (`preset`).")
