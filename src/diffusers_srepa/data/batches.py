"""The micro-batches of one process from any step on, and a data loader whose failures are one sentence each."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from diffusers_srepa.data.order import GlobalBatchSampler
from diffusers_srepa.data.read_errors import RESUME, loader_error
from diffusers_srepa.errors import ConfigurationError


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
    worker_init_fn: Callable[[int], None] | None = None,
) -> Generator[dict[str, torch.Tensor], None, None]:
    """This process's micro-batches for the optimiser steps `[start_step, num_steps)`, in order.

    Args:
        dataset: map-style dataset taking a `SampleKey`, or an iterable dataset with `set_position(...)`.
        global_batch_size (`int`): images per optimiser step over all processes.
        micro_batch_size (`int`): images per item of the iterator.
        seed (`int`): seed of the order.
        process_index (`int`), num_processes (`int`): rank of this process, and how many there are.
        start_step (`int`): optimiser steps already made.
        num_steps (`int`): optimiser steps of the whole run.
        num_workers (`int`): loader processes; a stream uses at most one, because its order is a sequence.
        pin_memory (`bool`): whether batches are put into page-locked memory.
        worker_init_fn (*optional*): called first in each loader process, with its number.

    Raises:
        ConfigurationError: the dataset is smaller than a global batch.
        DataError, from the iterator: what cannot be read, a loader process that died, see `read_batches`.
    """
    options: dict[str, Any] = {"num_workers": num_workers, "collate_fn": collate, "pin_memory": pin_memory}
    options |= {"worker_init_fn": worker_init_fn}
    place: dict[str, int] = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "process_index": process_index,
        "num_processes": num_processes,
        "start_step": start_step,
        "num_steps": num_steps - start_step,
    }
    if isinstance(dataset, IterableDataset):
        stream: Any = dataset
        stream.set_position(**place)
        options |= {"batch_size": micro_batch_size, "num_workers": min(num_workers, 1)}
        return read_batches(DataLoader(stream, **options))
    sampler = GlobalBatchSampler(len(dataset), seed=seed, **place)
    return read_batches(DataLoader(dataset, batch_sampler=sampler, **options))


def check_same_stream(dataset: Any, processes_before: int, processes_now: int) -> None:
    """Refuse to go on with a stream on another number of processes, which would read it in another order.

    A map-style dataset has the same order on any number of processes.
    """
    if isinstance(dataset, IterableDataset) and processes_before != processes_now:
        raise ConfigurationError(
            f"the checkpoint was written by {processes_before} process(es) and this run has {processes_now}, but a "
            "stream is read in the same order by the same number of processes only: change the number of processes, "
            "or set `resume_with_changes` to go on with other samples."
        )


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack the entries of `items`, tensors or numbers, along a new first dimension; all items have the same keys."""
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}


def read_batches(loader: DataLoader[Any], again: str = RESUME) -> Generator[Any, None, None]:
    """The batches of `loader`, once; failures arrive as one sentence, from whichever process they come.

    Args:
        loader (`DataLoader`): of any dataset of this package.
        again (`str`): what to do once a fault of the machine is mended, ends a sentence.

    Raises:
        DataError: what the dataset raised, wherever it was read; a loader process died; network or machine failed.
        ConfigurationError: what the dataset raised.
    """
    batches = iter(loader)
    alarm = _WorkerAlarm() if loader.num_workers else None
    try:
        while True:
            failure = None
            try:
                batch = next(batches) if alarm is None else alarm.wait_for(batches)
            except StopIteration:
                return
            except Exception as error:
                failure = loader_error(error, loader.num_workers, again)
                if failure is None:
                    raise
                # Frames of torch hold the loader's processes in a cycle; those would be ended late, by whichever
                # process collects it.
                traceback.clear_frames(error.__traceback__)
            if failure is not None:
                raise failure
            yield batch
    finally:
        if alarm is not None:
            alarm.remove()
        del batches


class _WorkerAlarm:
    """Lets the death of a loader process be known when a batch is asked for, and at no other moment.

    Torch raises it from a signal handler wherever the main program happens to be: in the middle of an optimiser step
    or of a checkpoint, or where Python ignores exceptions.
    """

    def __init__(self) -> None:
        self._death = ""
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGCHLD, self._handle)

    def wait_for(self, batches: Iterator[Any]) -> Any:
        """The next batch; torch's own RuntimeError if a loader process has died.

        One that dies meanwhile is found by torch's look at its processes, within five seconds.
        """
        if not self._death:
            try:
                return next(batches)
            except RuntimeError:
                # What the signal told says more than what that look finds: the exit code, or which signal it was.
                if not self._death:
                    raise
        raise RuntimeError(self._death)

    def remove(self) -> None:
        """Put the handler back that was there before, if nobody has replaced it since."""
        on_main = threading.current_thread() is threading.main_thread()
        if self._installed and on_main and signal.getsignal(signal.SIGCHLD) == self._handle:
            signal.signal(signal.SIGCHLD, self._previous)
        self._installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        try:
            if callable(self._previous):
                self._previous(number, frame)
        except RuntimeError as error:
            self._death = str(error)
