"""Files of a finished pipeline as they may be seen by anybody: without the paths of the machine that wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from diffusers_srepa.training.model_card import public_id, public_yaml
from diffusers_srepa.training.run_folder import CONFIG_FILE


_ORIGIN_KEY = "_name_or_path"


def publishable_versions(folder: Path, paths: Iterable[str]) -> dict[str, bytes]:
    """The files among `paths` that hold local paths, with what to publish instead.

    The run's `config.yaml` says "(local)" for a local path, as the model card does; the configuration of a component
    loses the note where it was loaded from, unless that is a repository of the Hub. All other files go as they are.

    Args:
        folder (`Path`): the pipeline's folder.
        paths (`Iterable[str]`): files to publish, relative to it, with forward slashes.
    """
    versions: dict[str, bytes] = {}
    for path in paths:
        if path == CONFIG_FILE:
            config = yaml.safe_load((folder / path).read_text(encoding="utf-8"))
            versions[path] = (public_yaml(config) + "\n").encode()
        elif Path(path).name == "config.json":
            config = json.loads((folder / path).read_text(encoding="utf-8"))
            if _ORIGIN_KEY in config and public_id(str(config[_ORIGIN_KEY])) is None:
                del config[_ORIGIN_KEY]
                versions[path] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return versions
