"""Exceptions that the package raises for wrong input: one sentence each, naming the option to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigurationError(ValueError):
    """An option, or a combination of options, that cannot work; found before training starts where possible."""


class DataError(ValueError):
    """A dataset, an image or a cached file that cannot be used as asked."""


def close_matches(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: `"did you mean 'a' or 'b'?"`, or all known names if none is close."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if matches:
        return "did you mean " + " or ".join(repr(match) for match in matches) + "?"
    return "known names are " + ", ".join(repr(known_name) for known_name in names)
