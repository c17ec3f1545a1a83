"""Names of the classes: those of ImageNet, or a file of the user's."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers_srepa.errors import ConfigurationError, one_line


# ILSVRC 2012: WordNet synset and its lemmas, in the order of the synsets, which is that of the labels. The names are
# WordNet's, as timm (timm/data/_info) tabulates them.
_FILE = Path(__file__).with_name("imagenet_classes.txt")


def imagenet_classes() -> dict[str, str]:
    """ImageNet's 1000 classes by number as text; an entry holds all synonyms, separated by commas."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return {str(number): line.split(" ", 1)[1] for number, line in enumerate(lines)}


def find_class_names(source: str | None, num_classes: int) -> dict[str, str] | None:
    """The `id2label` of a pipeline for a model of `num_classes` classes.

    Args:
        source (`str`, *optional*): "imagenet", "none", or a JSON file with a list of names or a mapping from numbers
            to names; by default ImageNet's names if there are 1000 classes, else none.
    """
    if source is None:
        return imagenet_classes() if num_classes == 1000 else None
    if source == "none":
        return None
    names = imagenet_classes() if source == "imagenet" else _read(Path(source))
    if sorted(names, key=int) != [str(number) for number in range(num_classes)]:
        raise ConfigurationError(
            f"`id2label` {source} names {len(names)} classes, but the model has the classes 0 to {num_classes - 1}."
        )
    return names


def _read(file: Path) -> dict[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"`id2label` {file} cannot be read ({one_line(error)}): give imagenet, none or a JSON file."
        ) from None
    if isinstance(content, list):
        content = {str(number): name for number, name in enumerate(content)}
    if isinstance(content, dict) and all(
        str(number).isdecimal() and isinstance(name, str) for number, name in content.items()
    ):
        return {str(int(number)): name for number, name in content.items()}
    raise ConfigurationError(f"`id2label` {file} must hold a list of names, or a mapping from numbers to names.")
