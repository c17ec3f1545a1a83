"""YAML files of options: read over their base, and laid over one another."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from diffusers_srepa.configuration.options import rename_former
from diffusers_srepa.errors import ConfigurationError, one_line


_MOST_VALUES = 10_000
_DEEPEST = 50


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; by default the first one is dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, config_class: type | None, _above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over the file that its `base:` names, relative to the file itself.

    Names that the options of `config_class` had formerly become today's.

    Raises:
        ConfigurationError: no such file, not YAML, not a mapping, or a `base:` that leads back to itself.
    """
    try:
        path = path.expanduser()
        if path.resolve() in _above:
            raise ConfigurationError(f"the configuration file {path} names itself as its base.")
        # A subclass of the safe loader: it makes plain values only.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except ConfigurationError:
        raise
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigurationError(f"the configuration file {path} cannot be read: {reason}.") from None
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        # PyYAML lets through whatever Python says of a number, a date or a path that cannot be.
        raise ConfigurationError(f"the configuration file {path} is not valid YAML: {one_line(error)}.") from None
    values = {} if values is None else values
    check_size(values, f"the configuration file {path}")
    if not isinstance(values, dict):
        raise ConfigurationError(f"the configuration file {path} holds a {type(values).__name__}, not a mapping.")
    base = values.pop("base", None)
    if config_class is not None:
        values = rename_former(values, config_class)
    if base is None:
        return values
    return merge(read_yaml(path.parent / str(base), config_class, (*_above, path.resolve())), values)


def check_size(values: Any, described: str) -> None:
    """Refuse values that are nested without end or in which aliases stand for millions of others."""
    visited, pending = 0, [(values, 0)]
    while pending:
        value, depth = pending.pop()
        visited += 1
        if depth > _DEEPEST or visited > _MOST_VALUES:
            raise ConfigurationError(
                f"{described} holds more than {_MOST_VALUES} values or mappings {_DEEPEST} levels deep, perhaps by an "
                "alias (*) that contains itself."
            )
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        pending += [(entry, depth + 1) for entry in inner]


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`: mappings merge by key unless their `name` differs, everything else is replaced.

    A name, such as `mlp`, below a mapping without one counts as `{name: mlp}`.
    """
    merged = dict(deepcopy(dict(under)))
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, str) and isinstance(value, Mapping):
            below = {"name": below}
        merged[key] = deepcopy(value)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            # {name: gram_kl, tau_student: 0.4} over {name: gram_mse} is another thing, not a change of the first.
            if "name" not in value or value["name"] == below.get("name", value["name"]):
                merged[key] = merge(below, value)
    return merged
