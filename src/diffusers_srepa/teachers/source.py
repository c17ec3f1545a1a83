"""Where a teacher comes from (a folder, a file or a Hub repository), and the sentence when it cannot be read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers.utils import cached_file

from diffusers_srepa.errors import ConfigurationError, causes, one_line
from diffusers_srepa.hub_errors import FETCH_ERRORS, explain_failure, is_caused_by


@dataclass(frozen=True)
class TeacherSource:
    """A name or path with the options that every file of it is read with."""

    name_or_path: str
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if not self.name_or_path:
            raise ConfigurationError(
                "the teacher's `name_or_path` is empty: give a Hub id, a folder or a weights file."
            )
        for key in ("subfolder", "revision"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                raise ConfigurationError(
                    f"the {key} of the teacher {self.name_or_path!r} is {value!r}, but must be text: change `{key}`."
                )

    @property
    def hub_arguments(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained` of `transformers`."""
        return {
            "subfolder": self.subfolder or "",
            "revision": self.revision or "main",
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }

    @property
    def is_offline(self) -> bool:
        """Whether it is on the Hub, which must not be asked: a file outside the cache may or may not exist."""
        return (self.local_files_only or constants.HF_HUB_OFFLINE) and not Path(self.name_or_path).is_dir()

    def read_config(self) -> dict[str, Any]:
        """The content of `config.json`, empty where there is none."""
        path = self._locate("config.json")
        return {} if path is None else self.read_json(path)

    def read_json(self, path: str) -> dict[str, Any]:
        """The mapping in one JSON file of the repository."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{Path(path).name} of the teacher {self.name_or_path!r} is not a valid JSON file "
                f"({one_line(error)}): repair it, or change `name_or_path`."
            ) from error
        if not isinstance(content, dict):
            raise ConfigurationError(
                f"{Path(path).name} of the teacher {self.name_or_path!r} holds a {type(content).__name__}, but must "
                f"hold a mapping: repair it, or change `name_or_path`."
            )
        return content

    def find_file(self, file_name: str) -> str | None:
        """The local path of one file, downloaded if need be; `None` where there is none, offline none cached."""
        try:
            return self._locate(file_name)
        except ConfigurationError as error:
            if self.is_offline and is_caused_by(error, LocalEntryNotFoundError):
                return None
            raise

    def _locate(self, file_name: str) -> str | None:
        """As `find_file`, but `None` only where the repository is known not to have the file."""
        try:
            return cached_file(self.name_or_path, file_name, **self.hub_arguments)
        except FETCH_ERRORS as error:
            # A file that is not there is an error without a cause and without a number; all others have one.
            is_missing = type(error) is OSError and error.errno is None and len(tuple(causes(error))) == 1
            if is_missing or self._known_as_missing(file_name):
                return None
            raise self.failure(error) from error

    def _known_as_missing(self, file_name: str) -> bool:
        """Whether the cache remembers that the repository did not have the file."""
        if Path(self.name_or_path).is_dir():
            return False
        path = f"{self.subfolder}/{file_name}" if self.subfolder else file_name
        try:
            found = try_to_load_from_cache(self.name_or_path, path, cache_dir=self.cache_dir, revision=self.revision)
        except HFValidationError:
            return False
        return found is _CACHED_NO_EXIST

    def failure(self, error: BaseException) -> ConfigurationError:
        """One sentence for what `transformers` and the Hub client raise."""
        return ConfigurationError(
            f"the teacher {self.name_or_path!r} {explain_failure(error, revision=self.revision)}."
        )
