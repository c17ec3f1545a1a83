"""Writing files and folders whole or not at all, and onto the disk rather than into a buffer."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers_srepa.errors import ConfigurationError


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


def check_name(what: str, name: object) -> None:
    """Refuse what is no plain name: names become folders, and must be names, never paths.

    Args:
        what (`str`): what is named, as the subject of the sentence.
        name (`object`): letters, digits, `_` and `-`, at least one.

    Raises:
        ConfigurationError: it is anything else.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigurationError(
            f"{what} is {name!r}, but must be a plain name of letters, digits, '_' and '-': change the name."
        )


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
