"""Which options of a resumed run differ from those that it was trained with before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_srepa.configuration.options import flatten, options_of, rename_former


def differing_options(before: Mapping[str, Any], now: Mapping[str, Any], config_class: type) -> list[str]:
    """The options that shape the training and are not what they were, each as "<name> was <value> and is <value>".

    Options declared with `resume=True` may change. Options that did not exist before count as having been at their
    default. Both configurations are as `to_dict` gives them; `before` may hold former names.
    """
    options = options_of(config_class)
    defaults = {name: declared.default for name, declared in options.items()}
    old, new = flatten(rename_former(before, config_class)), flatten(now)
    differing = []
    for name in sorted(old.keys() | new.keys()):
        was, is_now = old.get(name, defaults.get(name)), new.get(name)
        parents = [name[:end] for end in range(len(name), 0, -1) if end == len(name) or name[end] == "."]
        declared = next((options[parent] for parent in parents if parent in options), None)
        if str(was) != str(is_now) and not (declared is not None and declared.resume):
            differing.append(f"{name} was {was} and is {is_now}")
    return differing
