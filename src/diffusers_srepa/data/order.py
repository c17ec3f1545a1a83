"""Who sees which sample at which step: a function of seed, step and position, never of the machine.

The rows of an epoch are put in an order that depends on (seed, epoch) alone and cut into global batches. How a global
batch is divided among processes and accumulated micro-batches does not change its content, so that runs on other
numbers of processes are the same run, and a resumed run finds its place by counting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.randomness import keyed_rand, seed_for


class SampleKey(NamedTuple):
    """One sample of training: the dataset's row, the optimiser step, and the place in the step's global batch."""

    index: int  # type: ignore[assignment]  # The field hides tuple.index, which nobody calls here.
    step: int
    position: int


def is_flipped(seed: int, step: int, position: int) -> bool:
    """Whether the sample at a step and position is mirrored, where mirroring is on: true for half of them."""
    return bool(keyed_rand(seed, "flip", step, [position]) < 0.5)


def keyed_permutation(length: int, *key: int | str) -> np.ndarray:
    """A permutation of `range(length)` that depends on `key` alone, int64.

    Sorting the raw output of the bit generator keeps it the same in every version of numpy, which promises that for
    bit generators and not for `Generator.permutation`.
    """
    draws = np.random.PCG64(seed_for(*key)).random_raw(length)
    return np.argsort(draws, kind="stable")


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is divided: micro-batch m of process r holds the positions m * P * b + r * b + [0, b).

    Args:
        global_batch_size (`int`): samples per optimiser step over all processes and accumulated micro-batches.
        micro_batch_size (`int`): samples b per forward pass of one process.
        process_index (`int`): rank r of this process.
        num_processes (`int`): number P of processes.

    Raises:
        ConfigurationError: the global batch is no multiple of P * b, or a number is out of range.
    """

    global_batch_size: int
    micro_batch_size: int
    process_index: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")
        if not 0 <= self.process_index < self.num_processes:
            raise ConfigurationError(
                f"`process_index` is {self.process_index}, but must lie in [0, {self.num_processes}), the number of "
                "processes."
            )
        at_once = self.num_processes * self.micro_batch_size
        if self.global_batch_size % at_once:
            raise ConfigurationError(
                f"`global_batch_size` is {self.global_batch_size}, which is no multiple of {at_once}, the "
                f"{self.num_processes} process(es) times micro-batches of {self.micro_batch_size}: change "
                "`global_batch_size`, `micro_batch_size` or the number of processes."
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each process accumulates in one optimiser step."""
        return self.global_batch_size // (self.num_processes * self.micro_batch_size)

    @property
    def samples_per_step(self) -> int:
        """Samples of one process in one optimiser step."""
        return self.global_batch_size // self.num_processes

    def positions(self, micro_batch: int) -> range:
        """Places in the global batch of this process's `micro_batch`-th micro-batch."""
        start = (micro_batch * self.num_processes + self.process_index) * self.micro_batch_size
        return range(start, start + self.micro_batch_size)


class GlobalBatchSampler:
    """A batch sampler for a map-style dataset: yields this process's micro-batches as lists of `SampleKey`.

    The global batch of step s holds the rows [k G, (k + 1) G) of the permutation of (seed, epoch), where an epoch has
    `steps_per_epoch` steps and drops what is left over. Use it as `DataLoader(dataset, batch_sampler=...)`, and do not
    let accelerate prepare that loader: it would divide the batches a second time.

    Args:
        num_samples (`int`): rows of the dataset.
        global_batch_size (`int`): samples G per optimiser step over everything.
        micro_batch_size (`int`): samples of one yielded list.
        seed (`int`): seed of the order.
        process_index (`int`), num_processes (`int`): this process, and how many there are.
        start_step (`int`): step to begin with; a resumed run gives the number of steps already made.
        num_steps (`int`, *optional*): number of steps to yield from there on; by default it never ends.

    Raises:
        ConfigurationError: the dataset is smaller than a global batch, or the batch cannot be divided.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        self.layout = BatchLayout(global_batch_size, micro_batch_size, process_index, num_processes)
        if num_samples < global_batch_size:
            raise ConfigurationError(
                f"the dataset has {num_samples} rows, fewer than one global batch of {global_batch_size}: lower "
                "`global_batch_size` or use a larger dataset."
            )
        check_steps(start_step, num_steps)
        self.num_samples = num_samples
        self.seed = seed
        self.start_step = start_step
        self.num_steps = num_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per pass over the dataset; rows that do not fill a batch are left out of that pass."""
        return self.num_samples // self.layout.global_batch_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step, epoch, order = self.start_step, -1, np.empty(0, dtype=np.int64)
        while self.num_steps is None or step < self.start_step + self.num_steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = keyed_permutation(self.num_samples, self.seed, "order", epoch)
            first_row = (step % self.steps_per_epoch) * self.layout.global_batch_size
            for micro_batch in range(self.layout.num_micro_batches):
                positions = self.layout.positions(micro_batch)
                rows = order[first_row + positions.start : first_row + positions.stop].tolist()
                yield [SampleKey(row, step, position) for row, position in zip(rows, positions, strict=True)]
            step += 1


def check_steps(start_step: int, num_steps: int | None) -> None:
    """Refuse a negative place in the run with a ConfigurationError."""
    for name, value in {"start_step": start_step, "num_steps": num_steps or 0}.items():
        if value < 0:
            raise ConfigurationError(f"`{name}` is {value}, but must be at least 0.")
