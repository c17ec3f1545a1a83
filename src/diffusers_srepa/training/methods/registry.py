"""The training methods by name. Importing this is quick: a method's module is imported when it is chosen."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from diffusers_srepa.configuration.training import RunConfig, TrainingConfig


class MethodEntry(NamedTuple):
    """A method.

    Args:
        config_class: The dataclass of its options.
        module, class_name: Where the `TrainingMethod` is, built as `Class(config, transformer=None)`.
    """

    config_class: type[RunConfig]
    module: str
    class_name: str

    def load(self) -> Any:
        """The class of the method."""
        return getattr(importlib.import_module(self.module), self.class_name)


METHODS: dict[str, MethodEntry] = {
    "aligned-flow-matching": MethodEntry(
        TrainingConfig, "diffusers_srepa.training.methods.aligned_flow_matching", "AlignedFlowMatching"
    ),
}

METHOD_CONFIGS: dict[str, type[RunConfig]] = {name: entry.config_class for name, entry in METHODS.items()}
"""The options of each method, for the command line."""
