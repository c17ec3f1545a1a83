"""Declaring options: a dataclass field that carries its help, range and other names; walking over such fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from operator import ge, gt, lt
from typing import Any, get_type_hints

from diffusers_srepa.errors import ConfigurationError


@dataclass(frozen=True)
class Option:
    """What is known of one option.

    Args:
        name (`str`): dotted name, as in `"optimizer.lr"`.
        hint: type of the value; a dataclass for a section.
        default: value where none is given; `dataclasses.MISSING` for an option that must be given.
        help (`str`): one sentence for `--help`.
        minimum, above, below (`float`, *optional*): the range, of each of several numbers.
        choices (`tuple[str, ...]`, *optional*): the allowed values.
        resume (`bool`): whether it may change when a run is resumed; for a section, whether all of it may.
        card (`str`, *optional*): row of the model card that shows the value.
        also (`tuple[str, ...]`): names that other training scripts have for it, to answer them with this one.
        formerly (`str`, *optional*): dotted name that it had before in the same section, still read.
    """

    name: str
    hint: Any
    default: Any
    help: str = ""
    minimum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    resume: bool = False
    card: str | None = None
    also: tuple[str, ...] = ()
    formerly: str | None = None

    def check(self, value: Any, name: str) -> None:
        """Refuse a value outside the range or the choices, or not finite; of several values each is checked."""
        if isinstance(value, Mapping | list | tuple):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, entry in pairs:
                self.check(entry, f"{name}.{key}" if isinstance(value, Mapping) else f"{name}[{key}]")
        elif self.choices is not None and value is not None and value not in self.choices:
            raise ConfigurationError(f"{name} is {value!r}, but must be one of {', '.join(self.choices)}.")
        elif isinstance(value, int | float):
            if not math.isfinite(value):
                raise ConfigurationError(f"{name} is {value}, but must be a finite number.")
            limits = (("at least", self.minimum, ge), ("above", self.above, gt), ("below", self.below, lt))
            given = [(f"{word} {limit}", holds(value, limit)) for word, limit, holds in limits if limit is not None]
            if not all(holds for _, holds in given):
                raise ConfigurationError(f"{name} is {value}, but must be {' and '.join(text for text, _ in given)}.")


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    default_factory: Callable[[], Any] | None = None,
    **known: Any,
) -> Any:
    """A dataclass field that is an option of a command, or a section of options (`default_factory` its dataclass).

    Without `default` and `default_factory` the option must be given; `known` is what else [`Option`] holds.
    """
    # Name and type are those of the field, known when its class is there.
    metadata = {"option": Option("", None, default, help, **known)}
    if default_factory is not None:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@cache
def hints_of(config_class: type) -> dict[str, Any]:
    """The type hints of a dataclass by field."""
    return get_type_hints(config_class)


@cache
def options_of(config_class: type, prefix: str = "", resume: bool = False) -> dict[str, Option]:
    """The options and sections of a dataclass by dotted name, a section before what is in it."""
    found: dict[str, Option] = {}
    for field in dataclasses.fields(config_class):
        declared: Option = field.metadata.get("option", Option("", None, field.default))
        name, hint = f"{prefix}{field.name}", hints_of(config_class)[field.name]
        may_change = resume or declared.resume
        default = {} if field.default_factory is dict else field.default
        found[name] = dataclasses.replace(declared, name=name, hint=hint, default=default, resume=may_change)
        if is_dataclass(hint):
            found |= options_of(hint, f"{name}.", may_change)  # type: ignore[arg-type]
    return found


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Option, Any]]:
    """Every option of a configuration as dotted name, what is known of it, and its value.

    Dataclasses that are entries of a mapping are walked as well, as in `teachers.<name>.grid`.
    """
    options = options_of(type(config))  # type: ignore[arg-type]
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        inner = value.items() if isinstance(value, Mapping) else ()
        if is_dataclass(value):
            yield from walk(value, f"{name}.")
        elif any(is_dataclass(entry) for _, entry in inner):
            for key, entry in inner:
                yield from walk(entry, f"{name}.{key}.")
        else:
            yield name, options[field.name], value


def rename_former(values: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """`values` with options under the names that they had formerly brought under today's names."""
    renamed = dict(values)
    for name, declared in options_of(config_class).items():
        section, _, former = (declared.formerly or "").rpartition(".")
        inner = renamed.get(section)
        if isinstance(inner, Mapping) and former in inner:
            today = name.rpartition(".")[2]
            renamed[section] = {today if key == former else key: value for key, value in inner.items()}
    return renamed


class Options:
    """Base of every command's dataclass of options."""

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Plain nested values, laid over what one of them stands for, such as a preset; here as they are."""
        return values

    def validate(self) -> None:
        """Refuse values out of their range with a `ConfigurationError` that names the option to change."""
        for name, declared, value in walk(self):
            declared.check(value, name)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain nested dicts and lists, ready for YAML or JSON."""
        return _plain(asdict(self))  # type: ignore[call-overload]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested values under dotted names, with lists and None as text, as hyper-parameter tables take them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
