"""The micro-batches of one process, from any step on."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from diffusers_srepa.data.collate import collate
from diffusers_srepa.data.loading import read_batches
from diffusers_srepa.data.order import GlobalBatchSampler
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.interruption import outlive_signals


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
) -> Generator[dict[str, torch.Tensor], None, None]:
    """This process's micro-batches for the optimiser steps `[start_step, num_steps)`, in order.

    Args:
        dataset: map-style dataset taking a `SampleKey`, or an iterable dataset with `set_position(...)`.
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
        DataError, from the iterator: what cannot be read, a loader process that died, see `read_batches`.
    """
    options: dict[str, Any] = {"num_workers": num_workers, "collate_fn": collate, "pin_memory": pin_memory}
    options |= {"worker_init_fn": outlive_signals}
    if isinstance(dataset, IterableDataset):
        stream: Any = dataset
        stream.set_position(
            start_step=start_step,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            process_index=process_index,
            num_processes=num_processes,
            num_steps=num_steps - start_step,
        )
        options |= {"batch_size": micro_batch_size, "num_workers": min(num_workers, 1)}
        return read_batches(DataLoader(stream, **options))
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
    return read_batches(DataLoader(dataset, batch_sampler=sampler, **options))


def check_same_stream(dataset: Any, processes_before: int, processes_now: int) -> None:
    """Refuse to go on with a stream on another number of processes, which would read it in another order.

    Args:
        dataset: dataset of the run; a map-style one has the same order on any number of processes.
        processes_before (`int`): processes that wrote the checkpoint.
        processes_now (`int`): processes of this run.

    Raises:
        ConfigurationError: `dataset` is a stream and the numbers differ.
    """
    if isinstance(dataset, IterableDataset) and processes_before != processes_now:
        raise ConfigurationError(
            f"the checkpoint was written by {processes_before} process(es) and this run has {processes_now}, but a "
            "stream is read in the same order by the same number of processes only: change the number of processes, "
            "or set --resume_with_changes to go on with other samples."
        )
