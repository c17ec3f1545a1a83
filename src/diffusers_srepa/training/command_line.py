"""From command line and YAML files to a `TrainingConfig`.

The order of merging, later wins: dataclass defaults < alignment preset < `base:` of a YAML file < the file itself <
the variant of it that `--variant` names < the next file of `--config` < every command-line option, wherever it stands.
Mappings merge by key; a mapping whose `name` changes is replaced whole; null removes an alignment term of the preset.
An unknown key is an error.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from diffusers_srepa.alignment.presets import DEFAULT_PRESET, alignment_preset, default_depth
from diffusers_srepa.errors import ConfigurationError, close_matches
from diffusers_srepa.training.config import TrainingConfig
from diffusers_srepa.training.config_files import check_keys, check_size, merge
from diffusers_srepa.training.sweeps import read_run_files


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
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    if print_config:
        sys.stdout.write(yaml.safe_dump(config.to_dict(), sort_keys=False) + _meaning_of_nulls(config))
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
    options, files, variant = _parse_options(parser, argv)
    return resolve(merge(read_run_files(files, variant), options), parser, validate)


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
    except (ArgumentError, RecursionError) as error:
        raise ConfigurationError(_one_sentence(error)) from None
    result = TrainingConfig(**{field.name: getattr(config, field.name) for field in fields(TrainingConfig)})
    _check_names(result)
    if validate:
        result.validate()
    return result


def _check_names(config: TrainingConfig) -> None:
    """Refuse an unknown model preset, and alignment terms that name or hold what does not exist."""
    # Imported here, so that --help stays quick.
    from diffusers_srepa.alignment.registry import build_terms
    from diffusers_srepa.models.transformer_sit import SIT_PRESETS

    if config.model.preset not in SIT_PRESETS:
        raise ConfigurationError(
            f"there is no model preset {config.model.preset!r}, {close_matches(config.model.preset, SIT_PRESETS)} "
            "(option model.preset)."
        )
    terms = {name: term for name, term in config.alignment.terms.items() if term is not None}
    build_terms(terms, config.alignment.target_transform)


def _meaning_of_nulls(config: TrainingConfig) -> str:
    """YAML comments for under the printed configuration: sizes and depth, where presets decide them."""
    from diffusers_srepa.models.transformer_sit import SIT_PRESETS

    model, alignment = config.model, config.alignment
    if model.init_from is not None:
        return f"# The sizes of the model are those of {model.init_from}.\n"
    preset = SIT_PRESETS[model.preset]
    given = {name: getattr(model, name) for name in preset}
    sizes = {name: preset[name] if value is None else value for name, value in given.items()}
    nulls = [f"model.{name}: {sizes[name]}" for name, value in given.items() if value is None]
    if any(alignment.terms.values()) and alignment.depth is None and alignment.tap is None:
        width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
        nulls.append(f"alignment.depth: {default_depth(sizes['num_layers'], width)}")
    if not nulls:
        return ""
    return "# Left open above and decided by the presets:\n" + "".join(f"#   {line}\n" for line in nulls)


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a SiT with representation alignment. Options may also come from YAML files (--config); "
        "options on the command line win over files.",
    )
    parser.add_class_arguments(TrainingConfig)
    parser.add_argument("--config", action="append", default=[], help="YAML file; repeatable, later files win.")
    parser.add_argument("--variant", help="Which run of the file named by --config, if that file is a sweep.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration and exit.")
    return parser


def _parse_options(parser: ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str], str | None]:
    """The options given on the command line as nested values, the files of `--config`, and the `--variant`."""
    argv, free = _take_free_options(argv)
    try:
        namespace = parser.parse_args(_complete_flags(argv), defaults=False)
    except ArgumentError as error:
        raise ConfigurationError(_one_sentence(error)) from None
    values = namespace.as_dict()
    files, variant = values.pop("config", []), values.pop("variant", None)
    values.pop("print_config", None)
    return merge(values, free), files, variant


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
        check_size(value, f"option {name}")
        for part in reversed(name.split(".")):
            value = {part: value}
        taken = merge(taken, value)
    return rest, taken


def _parse_scalar(text: str) -> Any:
    """A value as a YAML file would give it, `1e-3` being a number here too."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value
    except (ValueError, AttributeError, RecursionError, yaml.YAMLError):
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


def _one_sentence(error: Exception) -> str:
    text = " ".join(str(error).replace("Parser key", "option").split())
    return text if text.endswith(".") else text + "."
