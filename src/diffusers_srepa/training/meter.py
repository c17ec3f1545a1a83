"""Running means of logged values, and the speed of training."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator


class Meter:
    """Collects the values of every step between two logged ones, on the device and without waiting for it.

    Args:
        images_per_step (`int`): the global batch size.
    """

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._paused = 0.0
        self._since = time.perf_counter()

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add the scalars of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1

    def exclude(self, seconds: float) -> None:
        """Do not count time spent on checkpoints and validation as training time."""
        self._paused += seconds

    def collect(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over steps and processes since the last call, and `images_per_second`; every rank must call."""
        names = sorted(self._sums)
        values: dict[str, float] = {}
        if names:
            # A term that ended within the interval has fewer values than steps.
            means = torch.stack([self._sums[name].float() / self._counts[name] for name in names])
            values = dict(zip(names, accelerator.reduce(means, reduction="mean").tolist(), strict=True))
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        values["images_per_second"] = self._steps * self.images_per_step / seconds
        self._sums, self._counts, self._steps, self._paused = {}, {}, 0, 0.0
        self._since = time.perf_counter()
        return values
