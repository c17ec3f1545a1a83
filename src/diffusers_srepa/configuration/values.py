"""From plain values, as YAML and command lines give them, to the types that a dataclass of options declares."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from diffusers_srepa.configuration.files import check_size
from diffusers_srepa.configuration.options import hints_of, options_of
from diffusers_srepa.errors import ConfigurationError, one_line


T = TypeVar("T")

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def build(config_class: type[T], values: Mapping[str, Any]) -> T:
    """A `config_class` from nested plain values; what is not given has its default."""
    check_names(values, config_class)
    built: T = _convert(dict(values), config_class, "")
    return built


def check_names(values: Mapping[Any, Any], config_class: type, prefix: str = "") -> None:
    """Refuse names that are no option of `config_class`; `prefix` is the section that holds `values`, with its dot."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if find_hint(config_class, name) is None:
            raise unknown_option(name, config_class)
        if isinstance(value, Mapping):
            check_names(value, config_class, f"{name}.")


def unknown_option(name: str, config_class: type, dashes: str = "") -> ConfigurationError:
    """The answer to a name that is no option: the one that it has here, or close ones, each behind its `dashes`."""
    options = options_of(config_class)
    last = name.replace("-", "_").rpartition(".")[2]
    found = [known for known, declared in options.items() if last in declared.also or name == declared.formerly]
    found += [known for known in options if known.rpartition(".")[2] == last and known not in found]
    if len(found) == 1:
        return ConfigurationError(f"there is no option {dashes}{name}: here it is {dashes}{found[0]}.")
    if not found:
        close = difflib.get_close_matches(last, [known.rpartition(".")[2] for known in options], n=3, cutoff=0.7)
        found = [known for known in options if known.rpartition(".")[2] in close]
    if not found:
        return ConfigurationError(f"there is no option {dashes}{name}: --help lists them all.")
    # Of sections that have an option of that name, those first that are called about as the one that was named.
    found = sorted(found, key=lambda known: -difflib.SequenceMatcher(None, known, name).ratio())[:3]
    meant = " or ".join(repr(dashes + known) for known in found)
    return ConfigurationError(f"there is no option {dashes}{name}, did you mean {meant}?")


def find_hint(hint: Any, name: str) -> Any:
    """The type of what the dotted `name` leads to within `hint`; None if it leads nowhere."""
    for part in name.split("."):
        if hint is Any:
            continue
        mapping = next((member for member in _members(hint) if get_origin(member) is dict), None)
        if is_dataclass(hint):
            hint = hints_of(hint).get(part)  # type: ignore[arg-type]
        else:
            hint = None if mapping is None or not part else get_args(mapping)[1]
    return hint


def parse_text(texts: Sequence[str], hint: Any, name: str) -> Any:
    """The plain value that the texts after an option on a command line stand for."""
    members = _members(hint)
    entries = next((get_args(member)[0] for member in members if get_origin(member) in (list, tuple)), None)
    if not texts and bool in members:
        return True
    if not texts or texts == [""] and str not in members:
        raise ConfigurationError(f"option {name} has no value: give one.")
    if entries is not None:
        value = parse_scalar(texts[0], name) if texts[0].startswith("[") or texts[0] == "null" else None
        several = len(texts) > 1 or not (isinstance(value, list) or texts[0] == "null")
        return [parse_text([text], entries, name) for text in texts] if several else value
    if len(texts) > 1:
        raise ConfigurationError(f"option {name} takes one value, but is followed by {', '.join(texts)}.")
    is_text = str in members or any(get_origin(member) is Literal for member in members)
    is_mapping = texts[0].startswith("{") and any(get_origin(member) is dict for member in members)
    if is_text and not is_mapping and not (texts[0] == "null" and NoneType in members):
        return texts[0]
    return parse_scalar(texts[0], name)


def parse_scalar(text: str, name: str) -> Any:
    """A value as a YAML file would give it, `1e-3` being a number here too."""
    try:
        value = yaml.safe_load(text)
        value = float(value) if isinstance(value, str) else value
    except RecursionError:
        raise ConfigurationError(f"option {name} is nested without end.") from None
    except (ValueError, AttributeError, yaml.YAMLError):
        value = text
    check_size(value, f"option {name}")
    return value


def describe(hint: Any) -> str:
    """In words, which values a type has."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe(member) for member in arguments if member is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    return _NAMES.get(hint) or {list: "a list", dict: "a mapping"}.get(origin, "a value")


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint`, recursively."""
    members = _members(hint)
    if hint is Any or (value is None and NoneType in members):
        return value
    if is_dataclass(hint):
        return _convert_section(value, hint, name)
    if value is None:
        raise ConfigurationError(f"option {name} is null, but needs a value: give one, or leave it out.")
    for member in members:
        origin, arguments = get_origin(member), get_args(member)
        if origin is Literal:
            # YAML reads a bare no as false.
            value = "no" if value is False else value
            if isinstance(value, str) and value in arguments:
                return value
        elif origin is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: _convert(entry, arguments[1], f"{name}.{key}") for key, entry in value.items()}
        elif origin is list and isinstance(value, list):
            return [_convert(entry, arguments[0], f"{name}[{index}]") for index, entry in enumerate(value)]
        elif origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
            pairs = enumerate(zip(value, arguments, strict=True))
            return tuple(_convert(entry, each, f"{name}[{index}]") for index, (entry, each) in pairs)
        elif member in (int, float) and (number := _number(value, member)) is not None:
            return number
        elif member in (bool, str) and isinstance(value, member):
            return value
    raise ConfigurationError(f"option {name} is {one_line(repr(value), 80)}, but must be {describe(hint)}.")


def _convert_section(value: Any, config_class: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        shown = one_line(repr(value), 80)
        raise ConfigurationError(f"section {name} is {shown}, but must be a mapping of options to values.")
    prefix = f"{name}." if name else ""
    for field in dataclasses.fields(config_class):
        has_default = not (field.default is field.default_factory is dataclasses.MISSING)
        if not has_default and value.get(field.name) is None:
            raise ConfigurationError(f"no {field.name} is given: set --{prefix}{field.name}.")
    hints = hints_of(config_class)
    return config_class(**{key: _convert(entry, hints[key], f"{prefix}{key}") for key, entry in value.items()})


def _number(value: Any, kind: type) -> int | float | None:
    """A number of that kind, also from text such as 1e-3, which YAML takes for text; None for what is no such one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
        if kind is float:
            return number
        # Not by way of a float, which has not all digits.
        return value if isinstance(value, int) else int(number) if number.is_integer() else None
    except (ValueError, OverflowError):
        return None
