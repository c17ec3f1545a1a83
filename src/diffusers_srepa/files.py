"""Writing files and folders whole or not at all, and onto the disk rather than into a buffer."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from diffusers_srepa.errors import ConfigurationError, one_line


logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
TEMPORARY_PREFIX = ".incomplete-"
"""What half-written files and folders are called, before their own name; a killed process leaves them behind."""


@contextmanager
def written_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final`, which takes its place when the context ends without an error.

    On an error the temporary folder goes, with the parents that were made for it, and what was at `final` stays.

    Raises:
        OSError: as the system raises it.
    """
    made = _make_parents(final)
    temporary = _temporary(final)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        flush(temporary)
        _replace_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        raise


@contextmanager
def written_file(final: Path) -> Iterator[Path]:
    """The path of a temporary file beside `final`, which takes its place when the context ends without an error.

    Raises:
        OSError: as the system raises it.
    """
    made = _make_parents(final)
    temporary = _temporary(final)
    try:
        yield temporary
        flush_entry(temporary)
        os.replace(temporary, final)
        flush_entry(final.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        _remove_empty(made)
        raise


def write_text(final: Path, text: str) -> None:
    """Write UTF-8 text such that, whatever happens, either the old content is there or the new one."""
    with written_file(final) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_folder(folder: Path) -> None:
    """Delete a folder such that under its name it is whole or absent, also if the process is killed meanwhile."""
    going = _temporary(folder)
    shutil.rmtree(going, ignore_errors=True)
    os.replace(folder, going)
    shutil.rmtree(going)


def remove_incomplete(parent: Path) -> None:
    """Delete what a killed process left half-written or half-deleted in `parent`; nobody else may be writing there."""
    for path in parent.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Have the system write a folder, and all that is in it, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush_entry(path)


def flush_entry(path: Path) -> None:
    """Have the system write one file, or the names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remedy(error: BaseException) -> str:
    """What can be done about a write that the system refused: make room, or see what has become of the folder."""
    is_gone = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError)
    is_gone = is_gone or getattr(error, "errno", None) == errno.EROFS
    return "see what has become of the folder" if is_gone else "make room"


def check_name(what: str, name: object, *, free: bool = False) -> None:
    """Refuse what is no plain name: names become files and folders, and must be names, never paths.

    Args:
        what (`str`): what is named, as the subject of the sentence.
        name (`object`): letters, digits, `_` and `-`, at least one.
        free (`bool`): whether any other printable characters will do, but for `/`, `\\` and a dot in front.

    Raises:
        ConfigurationError: it is anything else.
    """
    if free:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or re.search(r"^\s*\.|[/\\]", name):
            raise ConfigurationError(
                f"{what} is {name!r}, but must be a name without '/', '\\' and a dot in front: change the name."
            )
        return
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigurationError(
            f"{what} is {name!r}, but must be a plain name of letters, digits, '_' and '-': change the name."
        )


def check_output_place(folder: Path) -> None:
    """Refuse to write into the root of a file system or into the home folder themselves.

    Raises:
        ConfigurationError: `folder` is one of them, or its path cannot be resolved.
    """
    try:
        place, home = folder.resolve(), Path.home().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"the folder {str(folder)[:80]!r} cannot be used ({one_line(error)}): set another `output_dir`."
        ) from None
    if place in (home, place.parent):
        kind = "your home folder" if place == home else "the root of a file system"
        raise ConfigurationError(
            f"{folder} is {kind}: set `output_dir` to a folder of its own, below it or elsewhere."
        )


class FolderLock:
    """An exclusive lock on an output folder, which the system lets go when its process ends, however it ends.

    Args:
        folder (`Path`): made if it is missing.
        holder (`str`): what works in the folder, for the sentence, such as `"run"`.
        name (`str`): of the file that is locked; what may work side by side has locks of different names.
    """

    def __init__(self, folder: Path, holder: str, name: str = LOCK_FILE) -> None:
        self.folder = folder
        self.file = folder / name
        self.holder = holder
        self._locked: TextIO | None = None
        self._has_made_folder = False

    def acquire(self) -> None:
        """Take the lock, or warn where the file system has no locks.

        Raises:
            ConfigurationError: another process has it.
        """
        try:
            import fcntl
        except ImportError:
            return
        self._has_made_folder = self._has_made_folder or not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.file.open("a+")
        try:
            # `lockf`, not `flock`: loader processes that outlive a killed run must not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning(
                    f"the folder {self.folder} cannot be locked ({error.strerror}): start one {self.holder} in it "
                    "only."
                )
                return
            raise ConfigurationError(
                f"the output folder {self.folder} is in use by a {self.holder} that goes on ({holder}): stop that "
                f"{self.holder} first, or set another `output_dir`."
            ) from None
        if not self._is_current(file):
            # The holder of the lock took the file away between opening and locking.
            file.close()
            self.acquire()
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._locked = file

    def _is_current(self, file: TextIO) -> bool:
        # Compared without opening it again: closing any handle of a file lets its `lockf` lock go.
        path = self.file
        return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())

    def release(self) -> None:
        """Let the lock go and take its file away, and the folder if it was made for it and is still empty."""
        if self._locked is not None:
            self.file.unlink(missing_ok=True)
            self._locked.close()
            self._locked = None
            if self._has_made_folder and not any(self.folder.iterdir()):
                self.folder.rmdir()


def _temporary(final: Path) -> Path:
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}.{os.getpid()}")


def _replace_folder(new: Path, final: Path) -> None:
    # A folder cannot be renamed over another: the old one steps aside first, and comes back if that fails.
    old = new.with_name(f"{new.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    had_old = final.exists()
    if had_old:
        os.replace(final, old)
    try:
        os.replace(new, final)
    except BaseException:
        if had_old:
            os.replace(old, final)
        raise
    flush_entry(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _make_parents(final: Path) -> list[Path]:
    """Create the folders above `final`; those that were not there, deepest first."""
    missing = [parent for parent in final.absolute().parents if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
