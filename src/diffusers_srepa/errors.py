"""Exceptions for wrong input, and how any exception becomes part of one sentence.

A function of this package names its own arguments in backticks. Whoever calls it for a user of options, the command
line or the trainer, gives the sentence the names of the options: `with in_options({"resolution": "data.resolution"})`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


class ConfigurationError(ValueError):
    """An option, or a combination of options, that cannot work; found before training starts where possible."""


class DataError(ValueError):
    """A dataset, an image or a cached file that cannot be used as asked."""


@contextmanager
def in_options(options: Mapping[str, str]) -> Iterator[None]:
    """Around calls of functions whose arguments are set by options: errors name the options.

    Args:
        options (`Mapping[str, str]`): name of the option by name of the argument.

    Raises:
        ConfigurationError, DataError: those of the calls, every argument in backticks under its option's name.
    """
    try:
        yield
    except (ConfigurationError, DataError) as error:
        text = str(error)
        for argument, option in options.items():
            text = text.replace(f"`{argument}`", option)
        if text == str(error):
            raise
        raise type(error)(text) from error.__cause__


def one_line(error: object, limit: int = 200) -> str:
    """What an exception, or any text, says, on one line without a full stop; the exception's type if it says nothing.

    Args:
        error (`object`): exception or text.
        limit (`int`): characters after which it is cut.
    """
    text = " ".join(str(error).split())[:limit].rstrip(".: ")
    return text or type(error).__name__


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, the one that it was raised from or during, and so on; each once."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        current = current.__cause__ or current.__context__


def close_matches(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: `"did you mean 'a' or 'b'?"`, or all known names if none is close."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if matches:
        return "did you mean " + " or ".join(repr(match) for match in matches) + "?"
    return "known names are " + ", ".join(repr(known_name) for known_name in names)
