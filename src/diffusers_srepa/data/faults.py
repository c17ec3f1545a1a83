"""What went wrong while reading, in words: whose fault it is, and its one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from huggingface_hub.utils import httpx


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
_LONGEST_LINE = 300


def one_line(error: object) -> str:
    """The message of an error on one line without its full stop; the name of its class if it says nothing."""
    text = " ".join(str(error).split()).rstrip(".: ") or type(error).__name__
    return text if len(text) <= _LONGEST_LINE else text[:_LONGEST_LINE] + " ..."


def is_outage(error: BaseException) -> bool:
    """Whether network, server or machine failed, so that the same file may well be readable later.

    A server that answers "not found" or "forbidden" has not failed: what it was asked for is unreadable.
    """
    return any(_is_outage(cause) for cause in _causes(error))


def _is_outage(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError | MemoryError | httpx.TransportError):
        return True
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return True
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int):
        return status == 429 or status >= 500
    return type(error).__module__.partition(".")[0] == "aiohttp"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
