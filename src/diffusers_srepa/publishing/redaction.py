"""What of a run may be seen by anybody: no secret and no path of the machine that wrote it.

Names of the Hub stay, everything local becomes "(local)", and what looks like a secret goes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


RUN_CONFIG_FILE = "config.yaml"
"""The file of a pipeline's folder that holds the configuration of the run."""

# The loaders of `datasets` that read local files; they have the form of a dataset's name.
_FILE_LOADERS = {"arrow", "audiofolder", "csv", "imagefolder", "json", "parquet", "text", "webdataset"}
# What `data.dataset` and `latents.vae` take besides repositories and folders.
_WORDS = _FILE_LOADERS | {"pixels"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.(arrow|bin|ckpt|json|jsonl|npz|parquet|pt|pth|safetensors|tar|ya?ml|zip)", re.IGNORECASE)
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|credentials?|api_key|authorization)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{8,}")
_LOCAL_KEY = re.compile(r"(_dir|_cache|_file|_folder|^base|^resume_from_checkpoint)$")
# Options that name a repository or a folder; the value may be a bare folder name.
_SOURCE_KEY = re.compile(r"^(dataset|vae|name_or_path|init_from)$")
# Where diffusers notes what a component was loaded from.
_ORIGIN_KEY = "_name_or_path"


def public_id(name: str | None) -> str | None:
    """`name` if it is the id of a Hub repository, None if it is a local path, a URL or a loader of local files."""
    if not name or not _HUB_ID.fullmatch(name) or name in _FILE_LOADERS or _FILE_SUFFIX.search(name):
        return None
    return None if os.path.exists(name) else name


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested configuration without secrets, local paths replaced by "(local)"."""
    return {str(key): _public_value(str(key), value) for key, value in config.items() if not _is_secret(key, value)}


def public_yaml(config: Mapping[str, Any]) -> str:
    """`public_config` as YAML, without the line break at the end."""
    return yaml.safe_dump(public_config(config), sort_keys=False, allow_unicode=True).strip()


def public_versions(folder: Path, paths: Iterable[str]) -> dict[str, bytes]:
    """The files among `paths` that hold local paths, with what to publish instead.

    The run's `config.yaml` says "(local)" for a local path, as the model card does; the configuration of a component
    loses the note where it was loaded from, unless that is a repository of the Hub. All other files go as they are.
    The paths are relative to the pipeline's folder.
    """
    versions: dict[str, bytes] = {}
    for path in paths:
        if path == RUN_CONFIG_FILE:
            config = yaml.safe_load((folder / path).read_text(encoding="utf-8"))
            versions[path] = (public_yaml(config) + "\n").encode()
        elif Path(path).name == "config.json":
            config = json.loads((folder / path).read_text(encoding="utf-8"))
            if _ORIGIN_KEY in config and public_id(str(config[_ORIGIN_KEY])) is None:
                del config[_ORIGIN_KEY]
                versions[path] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return versions


def _is_secret(key: Any, value: Any) -> bool:
    # A flag such as `drop_class_token` is no secret.
    return isinstance(value, str) and _SECRET_KEY.search(str(key)) is not None


def _public_value(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_config(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_public_value(key, entry) for entry in value]
    if isinstance(value, os.PathLike):
        return "(local)"
    if not isinstance(value, str):
        return value if isinstance(value, bool | int | float) or value is None else _public_value(key, str(value))
    if _SECRET_VALUE.search(value):
        return "(removed)"
    is_folder = _SOURCE_KEY.search(key) is not None and value not in _WORDS and os.path.exists(value)
    return "(local)" if is_folder or _LOCAL_KEY.search(key) or _looks_local(value) else value


def _looks_local(value: str) -> bool:
    if value.startswith(("/", "~", "./", "../", "file:")) or value in (".", ".."):
        return True
    if "\\" in value or "://" in value or value.count("/") > 1:
        return True
    # Without a slash, as in the split "train", it is no path even where a file happens to have that name.
    return "/" in value and os.path.exists(value)
