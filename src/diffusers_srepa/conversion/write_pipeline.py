"""Writing a result whole or not at all: into a temporary neighbour, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from diffusers_srepa.errors import ConfigurationError


PIPELINE_FILE = "model_index.json"


def check_target(target: Path, overwrite: bool, sources: Iterable[str | Path]) -> None:
    """Refuse a folder that must not be written to; changes nothing.

    Args:
        target (`Path`): folder to write.
        overwrite (`bool`): whether a pipeline that is there may be replaced.
        sources (`Iterable[str | Path]`): what is read, as paths or Hub ids.

    Raises:
        ConfigurationError: the target is a file, is not empty and not to be replaced, is no pipeline, or holds or is
            one of the sources.
    """
    place = target.resolve()
    for source in sources:
        path = Path(source).resolve()
        if Path(source).exists() and (path == place or place in path.parents):
            raise ConfigurationError(
                f"--output_dir {target} holds what is read, {source}: choose another folder, so that nothing is lost."
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"--output_dir {target} is a file, but must be a folder.")
    if place in (Path.cwd(), *Path.cwd().parents):
        raise ConfigurationError(f"--output_dir {target} is the current folder or above it: choose another one.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigurationError(
            f"the folder {target} is not empty: choose another --output_dir, or replace the pipeline in it by "
            "--overwrite."
        )
    if not (target / PIPELINE_FILE).is_file():
        raise ConfigurationError(
            f"the folder {target} holds no pipeline ({PIPELINE_FILE}), and --overwrite replaces nothing else: choose "
            "another --output_dir."
        )


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, which then becomes `target`; a pipeline that was there goes.

    Raises:
        ConfigurationError: the files cannot be written; the target is as it was.
    """
    target = target.resolve()
    made = _make_parents(target)
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        fill(temporary)
        temporary.chmod(0o777 & ~_umask())
        _replace_folder(temporary, target)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, OSError | SafetensorError):
            raise ConfigurationError(_cannot_write(target, error)) from error
        raise


def write_file(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a temporary file, which then becomes `target`.

    Raises:
        ConfigurationError: the file cannot be written; the target is as it was.
    """
    target = target.resolve()
    made = _make_parents(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        fill(temporary)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _remove_empty(made)
        # torch.save reports a full disk as a RuntimeError.
        if isinstance(error, OSError | RuntimeError):
            raise ConfigurationError(_cannot_write(target, error)) from error
        raise


def _replace_folder(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    previous = source.with_name(f"{source.name}.previous")
    target.rename(previous)
    try:
        source.rename(target)
    except BaseException:
        previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _make_parents(target: Path) -> list[Path]:
    """Create the folders above the target; the ones that were not there, deepest first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(_cannot_write(target, error)) from error
    return missing


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _cannot_write(target: Path, error: BaseException) -> str:
    reason = " ".join(str(error).split()).rstrip(".")
    return f"{target} cannot be written ({reason}): nothing was changed; choose another --output_dir or free space."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
