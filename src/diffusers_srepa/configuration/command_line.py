"""From command lines and YAML files to a dataclass of options, the same for every command; help; answers to errors.

The order of merging, later wins: dataclass defaults < alignment preset < `base:` of a YAML file < the file itself <
the variant of it that `--variant` names < the next file of `--config` < every command-line option, wherever it stands.
Mappings merge by key; a mapping whose `name` changes is replaced whole; null removes an alignment term of the preset.
An unknown key is an error.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from diffusers_srepa.configuration.files import merge
from diffusers_srepa.configuration.options import Options, options_of
from diffusers_srepa.configuration.sweeps import read_run_files
from diffusers_srepa.configuration.training import DEFAULT_METHOD, RunConfig, TrainingConfig
from diffusers_srepa.configuration.values import build, check_names, describe, find_hint, parse_text, unknown_option
from diffusers_srepa.errors import ConfigurationError, close_matches


Config = TypeVar("Config", bound=Options)
Arguments = list[tuple[str, list[str]]]
FileReader = Callable[[Sequence[str | Path], str | None, type], dict[str, Any]]

METHODS: Mapping[str, type[RunConfig]] = {DEFAULT_METHOD: TrainingConfig}
"""The options of every method by its name."""

_FILE_OPTIONS = {
    "help": "Show this and exit.",
    "config": "YAML file of options; repeatable, later files win, options on the command line win over files.",
    "variant": "Which run of the file named by --config, if that file is a sweep.",
}


def parse_training_config(
    argv: Sequence[str] | None = None,
    explain: Callable[[Any], str] | None = None,
    methods: Mapping[str, type[RunConfig]] = METHODS,
    prog: str | None = None,
) -> TrainingConfig:
    """The configuration of a training script; prints help, or one sentence about a wrong option, and exits.

    Args:
        argv (`Sequence[str]`, *optional*): arguments without the program's name; by default the process's own.
        explain (`Callable`, *optional*): comments for under the configuration that `--print_config` prints.
        methods (`Mapping[str, type[RunConfig]]`): options of every method by its name, which `--method` chooses from.
        prog (`str`, *optional*): name of the program in its help.

    Returns:
        `TrainingConfig`: or the class of another method, where one is chosen.
    """
    about = "Train a diffusion transformer with representation alignment."
    config = parse_config(sys.argv[1:] if argv is None else argv, methods, prog, about, explain or (lambda config: ""))
    return cast(TrainingConfig, config)


def load_training_config(
    argv: Sequence[str], validate: bool = True, methods: Mapping[str, type[RunConfig]] = METHODS
) -> TrainingConfig:
    """The configuration of a training run, as [`load_config`] reads it."""
    return cast(TrainingConfig, load_config(argv, methods, validate))


def parse_config(
    argv: Sequence[str],
    config_class: type[Config] | Mapping[str, type[Config]],
    prog: str | None = None,
    description: str = "",
    explain: Callable[[Any], str] | None = None,
    read_files: FileReader = read_run_files,
) -> Config:
    """The options of a command; prints help, or one sentence about a wrong option, and exits.

    Args:
        argv (`Sequence[str]`): arguments without the command's name.
        config_class (`type[Options]`): dataclass of the command's options, or several by the names of the methods
            that the option `method` chooses from.
        prog, description (`str`): name of the command in its help, and what it does.
        explain (`Callable`, *optional*): gives the command the option `--print_config`, which prints the resolved
            options as YAML with these comments below them.
        read_files (`Callable`): gives the options that the files of `--config` hold; see [`read_run_files`].
    """
    arguments = [argument for argument in argv if argument != "--print_config" or explain is None]
    try:
        if {"-h", "--help"} & set(arguments):
            chosen = _choose_class(split_arguments(arguments), config_class)
            sys.stdout.write(format_help(chosen, prog, description, can_print=explain is not None))
        elif explain is None or len(arguments) == len(argv):
            return load_config(arguments, config_class, read_files=read_files)
        else:
            config = load_config(arguments, config_class, False, read_files)
            sys.stdout.write(yaml.safe_dump(config.to_dict(), sort_keys=False) + explain(config))
    except ConfigurationError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    raise SystemExit(0)


def load_config(
    argv: Sequence[str],
    config_class: type[Config] | Mapping[str, type[Config]],
    validate: bool = True,
    read_files: FileReader = read_run_files,
) -> Config:
    """The options that command-line arguments and the YAML files they name describe, as [`parse_config`] reads them.

    Args:
        validate (`bool`): whether values that cannot work, and what is missing, are refused.

    Raises:
        ConfigurationError: an unknown key or option, a value of a wrong type, or one that cannot work.
    """
    given = split_arguments(argv)
    chosen = _choose_class(given, config_class)
    values = merge(read_files(*_files_of(given), chosen), _read_options(given, chosen))
    check_names(values, chosen)
    config = build(chosen, chosen.complete(values))
    if validate:
        config.validate()
    return config


def format_help(config_class: type, prog: str | None, description: str, can_print: bool = False) -> str:
    """The text of `--help`: every option by section, with its values and its default."""
    parser = ArgumentParser(prog=prog, usage="%(prog)s [options]", description=description, add_help=False)
    groups = {"": parser.add_argument_group("options")}
    printing = {"print_config": "Print the resolved configuration and exit."} if can_print else {}
    for name, text in {**_FILE_OPTIONS, **printing}.items():
        groups[""].add_argument(f"--{name}", metavar="", help=text)
    for name, declared in options_of(config_class).items():
        if is_dataclass(declared.hint):
            groups[name] = parser.add_argument_group(name, declared.help)
            continue
        shown = "" if declared.default in (None, MISSING, {}) else f" (default: {declared.default})"
        values = f"{{{','.join(declared.choices)}}}" if declared.choices else f"<{describe(declared.hint)}>"
        text = f"{declared.help}{shown}".replace("%", "%%")
        groups[name.rpartition(".")[0]].add_argument(f"--{name}", metavar=values, help=text)
    return parser.format_help()


def split_arguments(argv: Sequence[str]) -> Arguments:
    """The options of a command line in their order, each with the texts that follow it."""
    given: Arguments = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, text = argument.removeprefix("--").partition("=")
            given.append((name, [text] if equals else []))
        elif given:
            given[-1][1].append(argument)
        else:
            raise ConfigurationError(f"there is no place for {argument!r}: options start with --.")
    return given


def _read_options(given: Arguments, config_class: type) -> dict[str, Any]:
    """The options of a command line as nested plain values."""
    values: dict[str, Any] = {}
    for name, texts in given:
        if name in ("config", "variant"):
            continue
        hint = find_hint(config_class, name)
        if hint is None:
            raise unknown_option(name, config_class, "--")
        value = parse_text(texts, hint, name)
        for part in reversed(name.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def _files_of(given: Arguments) -> tuple[list[str], str | None]:
    """The files of `--config`, and the `--variant`."""
    found: dict[str, list[str]] = {"config": [], "variant": []}
    for name, texts in given:
        if name in found:
            if not texts:
                raise ConfigurationError(f"option {name} has no value: give one.")
            found[name] += texts
    return found["config"], found["variant"][-1] if found["variant"] else None


def _choose_class(given: Arguments, config_class: type[Config] | Mapping[str, type[Config]]) -> type[Config]:
    """The one class that there is, or that of the method which the command line or its files name."""
    if not isinstance(config_class, Mapping):
        return config_class
    named = [texts[-1] for name, texts in given if name == "method" and texts]
    method = named[-1] if named else read_run_files(*_files_of(given)).get("method", DEFAULT_METHOD)
    if method not in list(config_class):
        raise ConfigurationError(
            f"there is no method {method!r}, {close_matches(str(method), config_class)} (option method)."
        )
    return config_class[method]
