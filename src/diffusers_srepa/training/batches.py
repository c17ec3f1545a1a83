"""The micro-batches of one process, from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from diffusers_srepa.data.collate import collate
from diffusers_srepa.data.order import GlobalBatchSampler


def training_batches(
    dataset: Any,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    seed: int,
    process_index: int,
    num_processes: int,
    start_step: int,
    num_steps: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's micro-batches for the optimiser steps `[start_step, num_steps)`, in order.

    Args:
        dataset: map-style dataset taking a `SampleKey`, or an iterable dataset with `start(...)`.
        global_batch_size (`int`): images per optimiser step over all processes.
        micro_batch_size (`int`): images per item of the iterator.
        seed (`int`): seed of the order.
        process_index (`int`): rank of this process.
        num_processes (`int`): number of processes.
        start_step (`int`): optimiser steps already made.
        num_steps (`int`): optimiser steps of the whole run.
        num_workers (`int`): loader processes; a stream uses at most one, because its order is a sequence.
        pin_memory (`bool`): whether batches are put into page-locked memory.

    Raises:
        ConfigurationError: the dataset is smaller than a global batch.
    """
    if isinstance(dataset, IterableDataset):
        workers = min(num_workers, 1)
        stream: Any = dataset
        stream.set_position(
            start_step=start_step,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            process_index=process_index,
            num_processes=num_processes,
        )
        loader = DataLoader(
            stream, batch_size=micro_batch_size, num_workers=workers, collate_fn=collate, pin_memory=pin_memory
        )
        return iter(loader)
    sampler = GlobalBatchSampler(
        len(dataset),
        global_batch_size,
        micro_batch_size,
        seed,
        process_index=process_index,
        num_processes=num_processes,
        start_step=start_step,
        num_steps=num_steps - start_step,
    )
    return iter(
        DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate, pin_memory=pin_memory)
    )
