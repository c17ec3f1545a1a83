"""The moving average of the trained weights: diffusers' `EMAModel` held to a constant decay, keyed by names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from torch import nn

from diffusers_srepa.training.sharding import shard_like


logger = get_logger(__name__)


class WeightAverage:
    """Exponential moving average of the trainable parameters of a module, with one decay from the first step on.

    Args:
        module (`nn.Module`): the unwrapped trainable module; transformer and projectors are averaged alike.
        decay (`float`): weight of the old average in each update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = [parameter for _, parameter in module.named_parameters()]
        # EMAModel ramps its decay up unless min_decay holds it, and skips its first update unless told otherwise.
        self.average = EMAModel(self.parameters, decay=decay, min_decay=decay, update_after_step=-1, foreach=True)

    def update(self) -> None:
        """Move the average towards the present weights; call once after each optimiser step."""
        # EMAModel would copy parameters that need no gradient; the average of a projector that has come to rest stays.
        every_shadow = self.average.shadow_params
        moving = [index for index, parameter in enumerate(self.parameters) if parameter.requires_grad]
        self.average.shadow_params = [every_shadow[index] for index in moving]
        try:
            self.average.step([self.parameters[index] for index in moving])
        finally:
            self.average.shadow_params = every_shadow

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module, which must not be sharded, has the averaged weights, afterwards its own."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def state(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name."""
        return dict(zip(self.names, self.average.shadow_params, strict=True))

    def load_state(self, state: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Put a saved average back.

        Args:
            state (`Mapping[str, torch.Tensor]`): averaged weights by parameter name.
            num_updates (`int`): updates made so far.

        Raises:
            ValueError: the names or shapes are not this module's.
        """
        missing = sorted(set(self.names) - set(state))
        unknown = sorted(set(state) - set(self.names))
        if missing or unknown:
            raise ValueError(
                f"the saved average is another model's: {len(missing)} weights are missing (first: {missing[:1]}), "
                f"{len(unknown)} are unknown (first: {unknown[:1]})."
            )
        for name, shadow in self.state().items():
            shadow.data.copy_(shard_like(state[name], shadow))
        self.average.optimization_step = num_updates


def warn_if_average_is_young(decay: float, max_steps: int) -> None:
    """Warn when the final average still holds more than a tenth of the initial weights."""
    share = decay**max_steps
    if share > 0.1:
        suggestion = math.exp(math.log(0.01) / max_steps)
        logger.warning(
            f"after {max_steps} steps an average with decay {decay} still holds {share:.0%} of the initial weights, "
            f"so its samples will be noise: lower training.ema_decay (to about {suggestion:.3f}) or train longer."
        )
