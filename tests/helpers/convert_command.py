"""`diffusers-srepa convert` as a function that returns what was written and raises what was wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers_srepa.cli.convert import ConvertOptions, convert
from diffusers_srepa.configuration.command_line import load_config
from diffusers_srepa.conversion.convert import Conversion


def run_convert(vae: str | Path, *options: Any, claim: Callable[[], str] | None = None) -> Conversion:
    """Convert with options as on the command line.

    Args:
        vae (`str` or `Path`): autoencoder for calls that give none, unless they go `--to repa`.
        options: words of the command line.
        claim (`Callable[[], str]`, *optional*): stands for claiming a repository on the Hub.
    """
    words = [str(option) for option in options]
    if "--to" not in words and "--vae" not in words:
        words += ["--vae", str(vae)]
    return convert(load_config(words, ConvertOptions), claim)
