"""Ending a run in good order when it is asked to stop: by a signal, by the death of its launcher, or by a callback."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

from diffusers_srepa.training.distributed import LONGEST_WAIT


EXIT_CODE = 75
"""Exit code of a run that was stopped and can be resumed: `EX_TEMPFAIL` of sysexits.h, "try again"."""

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_LAUNCHER_MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
# A launcher passes on a signal that scheduler or terminal have sent to every process already.
_SECONDS_OF_ONE_REQUEST = 5.0
# By then the training process has ended too, unless it hangs.
_SECONDS_THAT_WORKERS_STAY = 30.0


class TrainingInterrupted(Exception):
    """A run was asked to stop and has stopped after a whole step; `EXIT_CODE` is its exit code."""

    exit_code = EXIT_CODE


class Stop(IntEnum):
    """How a run stops; of two requests the greater one counts."""

    NOT = 0
    FINISH = 1
    """As if this were the last step: the pipeline is written."""
    INTERRUPT = 2
    """Save, and end with `EXIT_CODE`."""


class StopRequest:
    """Notices, as a context around the training, that it is asked to stop, and lets all processes agree on the step.

    The first SIGINT, SIGTERM or SIGHUP asks; what follows within five seconds is taken for the same request, and a
    later signal acts as it did outside the context. A launcher that is killed leaves its processes running without a
    word, so a parent process other than at the construction asks too.

    Args:
        accelerator (`Accelerator`): the run's.
        environment (`Mapping[str, str]`, *optional*): tells whether there is a launcher; the process's own by default.
    """

    def __init__(self, accelerator: Accelerator, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self.reason: str | None = None
        self.finish_reason: str | None = None
        self._parent = os.getppid() if any(mark in environment for mark in _LAUNCHER_MARKS) else None
        self._before: dict[signal.Signals, Any] = {}
        self._asked_at = 0.0
        self._group = None
        self._pending: tuple[Any, torch.Tensor] | None = None
        if accelerator.num_processes > 1:
            # A group of CPU tensors: asking an accelerator would make every step wait for it.
            self._group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                # nohup ignores SIGHUP on purpose.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if self._pending is not None and error is None:
            self._pending[0].wait()
        self._pending = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason, self._asked_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._asked_at > _SECONDS_OF_ONE_REQUEST:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def finish(self, reason: str) -> None:
        """Ask for the end of the run after this step; one process is enough."""
        self.finish_reason = reason

    def requested(self) -> bool:
        """Whether this process was asked to interrupt the run."""
        if self.reason is None and self._parent is not None and os.getppid() != self._parent:
            self.reason = "the end of its launcher"
        return self.reason is not None

    def agreed(self) -> Stop:
        """Whether the run stops now; every process must call once a step, and all get the same answer.

        With several processes the answer comes a step late, so that no step waits for it.
        """
        own = Stop.INTERRUPT if self.requested() else Stop.FINISH if self.finish_reason else Stop.NOT
        if self._group is None:
            return own
        flag = torch.tensor([int(own)])
        before = self._pending
        work = distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, flag)
        if before is None:
            return Stop.NOT
        before[0].wait()
        return Stop(int(before[1].item()))


def outlive_signals(worker_id: int) -> None:
    """Let a loader process survive the signals that its whole process group gets, until the run has stopped by itself.

    Give it to a `DataLoader` as `worker_init_fn`. Otherwise a terminal's Ctrl-C or a scheduler's SIGTERM kills the
    loader first, and the training process fails in the middle of a step.

    Args:
        worker_id (`int`): number of the worker, unused.
    """

    def leave_later(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(_SECONDS_THAT_WORKERS_STAY, os._exit, args=(0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), leave_later)
