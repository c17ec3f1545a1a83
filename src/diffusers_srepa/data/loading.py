"""Batches of a data loader whose failures arrive as one sentence, from whichever process they come."""

from __future__ import annotations

import re
import signal
import threading
import traceback
from collections.abc import Generator, Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from diffusers_srepa.data.faults import is_outage, one_line
from diffusers_srepa.errors import ConfigurationError, DataError


#: What to do after a fault of the machine in training.
RESUME = "go on from the last checkpoint with --resume_from_checkpoint latest"
#: How torch reports a loader process that is no longer there.
_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid.*?\) (exited unexpectedly(?: with exit code \d+)?|is killed by signal: [\w ]+)"
)


def read_batches(loader: DataLoader[Any], again: str = RESUME) -> Generator[Any, None, None]:
    """The batches of `loader`, once.

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
                failure = _in_one_sentence(error, loader.num_workers, again)
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
        """The next batch.

        Raises:
            RuntimeError: torch's own, if a loader process has died. One that dies meanwhile is found by torch's look
                at its processes, within five seconds.
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


def _in_one_sentence(error: Exception, num_workers: int, again: str) -> Exception | None:
    """The error as users should see it, or None for one that nobody foresaw, whose traceback is worth having."""
    died = _WORKER_DIED.search(" ".join(str(error).split())) if isinstance(error, RuntimeError) else None
    if died:
        return DataError(
            f"one of the {num_workers} loader process(es) died ({died.group(1)}), perhaps for lack of memory: lower "
            f"data.num_workers, and {again}."
        )
    # A loader process wraps its error in a traceback, of which the last line is "<class>: <message>".
    wrapped = str(error).startswith("Caught ")
    text = str(error).strip().splitlines()[-1].partition(": ")[2] if wrapped else str(error)
    if isinstance(error, DataError | ConfigurationError):
        return type(error)(text)
    if is_outage(error) or isinstance(error, OSError):
        return DataError(
            f"the dataset cannot be read any further ({one_line(text or type(error).__name__)}): see to the network, "
            f"the disk and the memory (options data.dataset, data.num_workers), and {again}."
        )
    return None
