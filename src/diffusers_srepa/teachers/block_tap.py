"""Reading the output of one block of a teacher, whatever the tower returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusers_srepa.errors import ConfigurationError


class BlockTap:
    """A forward hook that keeps the output of one block until it is popped.

    The hook is a bound method, so a deep copy of the teacher carries a tap of its own.
    """

    def __init__(self, block: nn.Module) -> None:
        self.hidden_states: torch.Tensor | None = None
        block.register_forward_hook(self.store)

    def store(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The hook: blocks return a tensor or, in some versions of `transformers`, a tuple that starts with it."""
        self.hidden_states = output[0] if isinstance(output, tuple) else output

    def pop(self) -> torch.Tensor:
        """The output of the block in the last forward, shape `(B, T, D)`; the tap is empty afterwards."""
        hidden_states, self.hidden_states = self.hidden_states, None
        if hidden_states is None:
            raise RuntimeError("the tapped block of the teacher did not run.")
        return hidden_states


def find_blocks(tower: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of transformer blocks of `tower`: its first `ModuleList` of `num_layers` entries.

    Found by structure because its name differs between families and between versions of `transformers`.

    Raises:
        ConfigurationError: there is no such list.
    """
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ConfigurationError(
        f"{type(tower).__name__} has no list of {num_layers} blocks to tap: leave layer unset for this teacher."
    )


def check_layer(layer: int, num_layers: int, name_or_path: str) -> int:
    """A block counted from 1.

    Raises:
        ConfigurationError: not an integer in `1..num_layers`.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= num_layers:
        raise ConfigurationError(
            f"layer={layer!r} of the teacher {name_or_path!r} must be an integer from 1 to {num_layers}, its number "
            f"of blocks."
        )
    return layer
