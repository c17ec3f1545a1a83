"""Random numbers keyed by what they are for, never by a process, a worker or a call order.

Every draw of training belongs to one sample of the global batch and comes from a generator keyed by
`(seed, stream, step, position)`: `stream` names its purpose, `step` counts optimiser steps, `position` is the
sample's place in the global batch. One process with batch 8, two with batch 4 and two accumulated batches of 4
therefore draw the same numbers, and a resumed run needs no stored generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


#: What the random numbers of training are for. A new purpose gets a new name, so that the others keep their draws.
STREAMS = ("vae", "time", "noise", "class_drop", "flip", "class_token_noise")


def seed_for(*key: int | str) -> int:
    """A seed in `[0, 2^63)` for `key`, the same in every process, on every machine and in every version of Python."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_for(*key)`."""
    return torch.Generator(device="cpu").manual_seed(seed_for(*key))


def keyed_randn(
    seed: int,
    stream: str,
    step: int,
    positions: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal numbers, CPU, `(len(positions), *shape)`, for the samples at `positions` of the batch of `step`.

    Row i depends on `positions[i]` alone.
    """
    rows = [
        torch.randn(tuple(shape), generator=keyed_generator(seed, stream, step, position), dtype=dtype)
        for position in positions
    ]
    return torch.stack(rows)


def keyed_rand(seed: int, stream: str, step: int, positions: Sequence[int]) -> torch.Tensor:
    """Uniform numbers in `[0, 1)`, float64, CPU, shape `(len(positions),)`; entry i depends on its position alone."""
    # The hash itself is the draw: 53 of its bits make a float64, and no generator has to be built.
    draws = [(seed_for(seed, stream, step, position) >> 10) * 2.0**-53 for position in positions]
    return torch.tensor(draws, dtype=torch.float64)
