"""Sweeps: one YAML file for several runs that differ in a few options.

Under its key `sweep` such a file holds named variants, each a mapping of options like the file itself:

    base: ../base_imagenet_256.yaml
    alignment: {preset: repa}
    sweep:
      depth_4: {alignment: {depth: 4}}
      depth_6: {alignment: {depth: 6}}

A run takes one of them: `--config <file> --variant depth_4`. The variant lies over the file's own options and below
the files named after it and the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_srepa.configuration.files import merge, read_yaml
from diffusers_srepa.configuration.options import rename_former
from diffusers_srepa.configuration.values import check_names
from diffusers_srepa.errors import ConfigurationError


SWEEP_KEY = "sweep"


def read_run_files(
    files: Sequence[str | Path], variant: str | None = None, config_class: type | None = None
) -> dict[str, Any]:
    """The options that `files`, later ones over earlier ones, give together.

    Args:
        files (`Sequence[str | Path]`): YAML files, each read over its own `base:`.
        variant (`str`, *optional*): which run of the one file that is a sweep.
        config_class (`type`, *optional*): dataclass whose options the variants hold; without it nobody looks.
    """
    merged: dict[str, Any] = {}
    sweep: Path | None = None
    for file in map(Path, files):
        values = read_yaml(file, config_class)
        if SWEEP_KEY in values:
            if sweep is not None:
                raise ConfigurationError(f"{sweep} and {file} are both sweeps: give --config one of them.")
            sweep = file
            values = _choose(values, variant, file, config_class)
        merged = merge(merged, values)
    if variant is not None and sweep is None:
        where = ", ".join(map(str, files)) or "no file"
        raise ConfigurationError(
            f"--variant is {variant!r}, but --config names no sweep ({where}): leave out --variant, or name a file "
            f"with the key {SWEEP_KEY}."
        )
    return merged


def read_variants(file: str | Path, config_class: type) -> dict[str, dict[str, Any]]:
    """The variants of a sweep by name, each with what it changes; empty for a file that is no sweep.

    The options are those of `config_class`, such as `TrainingConfig`.

    Raises:
        ConfigurationError: the file cannot be read, or a variant holds what is no option.
    """
    values = read_yaml(Path(file), config_class)
    return _variants(values, Path(file), config_class) if SWEEP_KEY in values else {}


def _choose(values: Mapping[str, Any], variant: str | None, file: Path, config_class: type | None) -> dict[str, Any]:
    variants = _variants(values, file, config_class)
    names = ", ".join(variants)
    if variant is None:
        raise ConfigurationError(f"{file} is a sweep: choose one of its runs with --variant, which are {names}.")
    if variant not in variants:
        close = difflib.get_close_matches(variant, variants, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ":"
        raise ConfigurationError(f"there is no variant {variant!r} in {file}{hint} the variants are {names}.")
    return merge({key: value for key, value in values.items() if key != SWEEP_KEY}, variants[variant])


def _variants(values: Mapping[str, Any], file: Path, config_class: type | None) -> dict[str, dict[str, Any]]:
    """All variants, checked: a typing error in one that is not asked for today would be met some other day."""
    sweep = values[SWEEP_KEY]
    if not isinstance(sweep, Mapping) or not sweep:
        raise ConfigurationError(
            f"the key {SWEEP_KEY} in {file} is {sweep!r}, but must be a mapping of variant names to options."
        )
    variants: dict[str, dict[str, Any]] = {}
    for name, options in sweep.items():
        if not isinstance(name, str):
            raise ConfigurationError(f"the variant name {name!r} in {file} is no text: put it in quotes.")
        options = {} if options is None else options
        if not isinstance(options, Mapping):
            raise ConfigurationError(
                f"the variant {name!r} in {file} is {options!r}, but must be a mapping of options."
            )
        variants[name] = dict(options) if config_class is None else rename_former(options, config_class)
        try:
            if config_class is not None:
                check_names(variants[name], config_class)
        except ConfigurationError as error:
            raise ConfigurationError(f"in the variant {name!r} of {file}, {error}") from None
    return variants
