"""Errors while reading data: whether the file is at fault or the machine, and one sentence for each."""

from __future__ import annotations

import errno
import re

from huggingface_hub.utils import httpx

from diffusers_srepa.errors import ConfigurationError, DataError, causes, one_line


#: What to do after a fault of the machine in training; ends a sentence.
RESUME = "go on from the last checkpoint with `resume_from_checkpoint`"

#: Errors of the machine or of a mounted file system, which say nothing about the file that was being read.
_OF_THE_MACHINE = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}
#: How torch reports a loader process that is no longer there.
_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid.*?\) (exited unexpectedly(?: with exit code \d+)?|is killed by signal: [\w ]+)"
)


def is_outage(error: BaseException) -> bool:
    """Whether network, server or machine failed, so that the same file may well be readable later.

    A server that answers "not found" or "forbidden" has not failed: what it was asked for is unreadable.
    """
    return any(_is_outage(cause) for cause in causes(error))


def loader_error(error: Exception, num_workers: int, again: str) -> Exception | None:
    """An error of a loader of `num_workers` processes as users should see it, or None for one that nobody foresaw.

    `again` says what to do once a fault of the machine is mended; it ends the sentence.
    """
    died = _WORKER_DIED.search(" ".join(str(error).split())) if isinstance(error, RuntimeError) else None
    if died:
        return DataError(
            f"one of the {num_workers} loader process(es) died ({died.group(1)}), perhaps for lack of memory: lower "
            f"`num_workers`, and {again}."
        )
    # A loader process wraps its error in a traceback, of which the last line is "<class>: <message>".
    wrapped = str(error).startswith("Caught ")
    text = str(error).strip().splitlines()[-1].partition(": ")[2] if wrapped else str(error)
    if isinstance(error, DataError | ConfigurationError):
        return type(error)(text)
    if is_outage(error) or isinstance(error, OSError):
        return DataError(
            f"the dataset cannot be read any further ({one_line(text or type(error).__name__)}): see to the network, "
            f"the disk and the memory (options `name_or_path`, `num_workers`), and {again}."
        )
    return None


def _is_outage(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError | MemoryError | httpx.TransportError):
        return True
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return True
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int):
        return status == 429 or status >= 500
    return type(error).__module__.partition(".")[0] == "aiohttp"
