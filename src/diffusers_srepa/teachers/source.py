"""Where a teacher comes from (a folder, a file or a Hub repository), and the sentence when it cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PretrainedConfig
from transformers.utils import cached_file

from diffusers_srepa.errors import ConfigurationError


@dataclass(frozen=True)
class TeacherSource:
    """A name or path with the options that every file of it is read with."""

    name_or_path: str
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

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
    def is_file(self) -> bool:
        """Whether the path is a file of weights."""
        return Path(self.name_or_path).is_file()

    def read_config(self) -> dict[str, Any]:
        """The content of `config.json`, empty where there is none.

        Raises:
            ConfigurationError: the repository or folder cannot be read.
        """
        try:
            config, _ = PretrainedConfig.get_config_dict(self.name_or_path, **self.hub_arguments)
        except (OSError, ValueError) as error:
            raise self.failure(error) from error
        return config

    def find_file(self, file_name: str) -> str | None:
        """The local path of one file, downloaded if need be, or `None` where the repository does not have it.

        Raises:
            ConfigurationError: the repository or folder cannot be read.
        """
        arguments = self.hub_arguments | {"_raise_exceptions_for_missing_entries": False}
        try:
            return cached_file(self.name_or_path, file_name, **arguments)
        except (OSError, ValueError) as error:
            raise self.failure(error) from error

    def failure(self, error: BaseException) -> ConfigurationError:
        """One sentence for what `transformers` and the Hub client raise."""
        found = tuple(_chain(error))

        def caused_by(*kinds: type[BaseException]) -> bool:
            return any(isinstance(cause, kinds) for cause in found)

        name = f"the teacher {self.name_or_path!r}"
        if caused_by(GatedRepoError):
            reason = "is gated: accept its conditions on its Hub page and pass a token that may read it"
        elif caused_by(RepositoryNotFoundError, HFValidationError):
            reason = "is neither a local folder or file nor a Hub repository that you can see: check the name or token"
        elif caused_by(RevisionNotFoundError):
            reason = f"has no revision {self.revision!r}: choose a branch, tag or commit of it"
        elif caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled):
            reason = (
                "is neither a local folder nor in the cache, and the Hub was not asked or cannot be reached: check "
                "the name, the network, cache_dir and local_files_only"
            )
        else:
            reason = f"cannot be loaded ({first_line(error)})"
        return ConfigurationError(f"{name} {reason}.")


def first_line(error: BaseException) -> str:
    """The first line of an error, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
