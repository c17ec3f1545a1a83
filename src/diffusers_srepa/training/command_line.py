"""From command line and YAML files to a `TrainingConfig`.

The order of merging, later wins: dataclass defaults < alignment preset < `base:` of a YAML file < the files in the
order in which `--config` names them < every command-line option, wherever it stands. Mappings merge by key; a mapping
whose `name` changes is replaced whole; null removes an alignment term of the preset. An unknown key is an error.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from diffusers_srepa.alignment.presets import DEFAULT_PRESET, alignment_preset
from diffusers_srepa.errors import ConfigurationError, close_matches
from diffusers_srepa.training.config import TrainingConfig


def parse_training_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """The configuration of a training script; prints help, or one sentence about a wrong option, and exits.

    Args:
        argv (`Sequence[str]`, *optional*): arguments without the program's name; by default the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        print_config = "--print_config" in arguments
        arguments = [argument for argument in arguments if argument != "--print_config"]
        config = load_training_config(arguments, validate=not print_config)
    except ConfigurationError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    if print_config:
        sys.stdout.write(yaml.safe_dump(config.to_dict(), sort_keys=False))
        raise SystemExit(0)
    return config


def load_training_config(argv: Sequence[str], validate: bool = True) -> TrainingConfig:
    """The configuration that command-line arguments and the YAML files they name describe.

    Args:
        argv (`Sequence[str]`): arguments without the program's name.
        validate (`bool`): whether values that cannot work, and what is missing, are refused.

    Raises:
        ConfigurationError: an unknown key or option, a value of a wrong type, or one that cannot work.
    """
    parser = _build_parser()
    options, files = _parse_options(parser, argv)
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, read_yaml(Path(file)))
    return resolve(merge(merged, options), parser, validate)


def resolve(values: Mapping[str, Any], parser: ArgumentParser | None = None, validate: bool = True) -> TrainingConfig:
    """A `TrainingConfig` from nested plain values; what is not given comes from the preset and the defaults.

    Raises:
        ConfigurationError: as `load_training_config`.
    """
    check_keys(values)
    alignment = dict(values.get("alignment") or {})
    alignment = merge(alignment_preset(str(alignment.get("preset", DEFAULT_PRESET))), alignment)
    merged = {**values, "alignment": alignment}
    parser = parser or _build_parser()
    try:
        namespace = parser.parse_object({key: value for key, value in merged.items() if value is not None})
        config = parser.instantiate(namespace)
    except ArgumentError as error:
        raise ConfigurationError(_one_sentence(error)) from None
    result = TrainingConfig(**{field.name: getattr(config, field.name) for field in fields(TrainingConfig)})
    if validate:
        result.validate()
    return result


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`: mappings merge by key unless their `name` differs, everything else is replaced."""
    merged = dict(deepcopy(dict(under)))
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and _same_kind(below, value):
            merged[key] = merge(below, value)
        else:
            merged[key] = deepcopy(value)
    return merged


def _same_kind(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    # {name: gram_kl, tau_student: 0.4} over {name: gram_mse} is another thing, not a change of the first.
    return "name" not in above or above["name"] == below.get("name", above["name"])


def read_yaml(path: Path, _above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over the file that its `base:` names, relative to the file itself.

    Raises:
        ConfigurationError: no such file, not YAML, not a mapping, or a `base:` that leads back to itself.
    """
    path = path.expanduser()
    if path.resolve() in _above:
        raise ConfigurationError(f"the configuration file {path} names itself as its base.")
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"the configuration file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        raise ConfigurationError(f"the configuration file {path} is not valid YAML: {message}.") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigurationError(f"the configuration file {path} holds a {type(values).__name__}, not a mapping.")
    base = values.pop("base", None)
    if base is None:
        return values
    return merge(read_yaml(path.parent / str(base), (*_above, path.resolve())), values)


def check_keys(values: Mapping[str, Any], target: type = TrainingConfig, prefix: str = "") -> None:
    """Refuse keys that are no field of the (nested) dataclass `target`.

    Raises:
        ConfigurationError: naming the key and the closest known ones.
    """
    hints = get_type_hints(target)
    for key, value in values.items():
        if key not in hints:
            raise ConfigurationError(
                f"there is no option {prefix}{key}, {close_matches(str(key), hints)}"
                + (f" (in section {prefix.rstrip('.')})" if prefix else "")
                + "."
            )
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigurationError(
                    f"section {prefix}{key} is {value!r}, but must be a mapping of options to values."
                )
            check_keys(value, hints[key], f"{prefix}{key}.")


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a SiT with representation alignment. Options may also come from YAML files (--config); "
        "options on the command line win over files.",
    )
    parser.add_class_arguments(TrainingConfig)
    parser.add_argument("--config", action="append", default=[], help="YAML file; repeatable, later files win.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration and exit.")
    return parser


def _parse_options(parser: ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options given on the command line as nested values, and the files named by `--config`."""
    argv, free = _take_free_options(argv)
    try:
        namespace = parser.parse_args(_complete_flags(argv), defaults=False)
    except ArgumentError as error:
        raise ConfigurationError(_one_sentence(error)) from None
    values = namespace.as_dict()
    files = values.pop("config", [])
    values.pop("print_config", None)
    return merge(values, free), files


def _take_free_options(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split off options below a free mapping, as `--alignment.terms.cosine.weight 3`, which no parser can know.

    Returns:
        The other arguments, and the free options as nested values.
    """
    prefixes = tuple(f"--{name}." for name in _options_of_type(_is_free_mapping))
    rest: list[str] = []
    taken: dict[str, Any] = {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(prefixes):
            rest.append(argument)
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            text = next(arguments, "")
        if not text or text.startswith("--"):
            raise ConfigurationError(f"option {name} has no value: give one.")
        value = _parse_scalar(text)
        for part in reversed(name.split(".")):
            value = {part: value}
        taken = merge(taken, value)
    return rest, taken


def _parse_scalar(text: str) -> Any:
    """A value as a YAML file would give it, `1e-3` being a number here too."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value
    except (ValueError, yaml.YAMLError):
        return text


def _complete_flags(argv: Sequence[str]) -> list[str]:
    """`--push_to_hub` written alone means `--push_to_hub true`."""
    switches = {f"--{name}" for name in _options_of_type(lambda hint: hint in (bool, bool | None))}
    completed: list[str] = []
    for position, argument in enumerate(argv):
        completed.append(argument)
        followed = position + 1 < len(argv) and not argv[position + 1].startswith("--")
        if argument in switches and not followed:
            completed.append("true")
    return completed


def _options_of_type(is_wanted: Callable[[Any], bool], target: Any = TrainingConfig, prefix: str = "") -> list[str]:
    """Dotted names of the options whose type hint `is_wanted`."""
    names: list[str] = []
    for name, hint in get_type_hints(target).items():
        if is_dataclass(hint):
            names += _options_of_type(is_wanted, hint, f"{prefix}{name}.")
        elif is_wanted(hint):
            names.append(f"{prefix}{name}")
    return names


def _is_free_mapping(hint: Any) -> bool:
    return any(get_origin(part) is dict for part in (hint, *get_args(hint)))


def _one_sentence(error: ArgumentError) -> str:
    text = " ".join(str(error).replace("Parser key", "option").split())
    return text if text.endswith(".") else text + "."
