"""Which checkpoints a run has, which of them are intact, which go."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from accelerate.logging import get_logger

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.run_folder import CHECKPOINT_PREFIX, checkpoint_folders


logger = get_logger(__name__)

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
TEMPORARY_PREFIX = ".incomplete-"


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means.

    Args:
        output_dir (`Path`): folder of the run.
        wanted (`str`): `"latest"` takes the newest intact checkpoint, naming the damaged ones that it passes over;
            else the path of a checkpoint, absolute or below `output_dir`.

    Returns:
        `Path`, or None if `"latest"` finds no checkpoint at all.

    Raises:
        ConfigurationError: the named checkpoint does not exist or is damaged, or all of them are.
    """
    if wanted != "latest":
        folder = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
        if not folder.is_dir():
            raise ConfigurationError(
                f"there is no checkpoint {wanted}: set --resume_from_checkpoint to a folder, or to latest."
            )
        damage = find_damage(folder)
        if damage:
            raise ConfigurationError(f"the checkpoint {folder} is damaged ({damage}): resume from another one.")
        return folder
    folders = checkpoint_folders(output_dir)
    for folder in reversed(folders):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning(f"the checkpoint {folder} is damaged ({damage}) and passed over.")
    if folders:
        raise ConfigurationError(
            f"all {len(folders)} checkpoints in {output_dir} are damaged: start anew in another --output_dir."
        )
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        written = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is missing or unreadable"
    for name, (size, digest) in {STATE_FILE: (None, None), **written}.items():
        file = folder / name
        try:
            if name not in written or not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if _digest(file) != digest:
                return f"{name} has other content than was written"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"
    return None


def prune_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; called after a new one is complete, so one always remains."""
    if limit is None:
        return
    for folder in checkpoint_folders(output_dir)[:-limit]:
        # Under its name a checkpoint is whole or absent, also if the run is killed here.
        going = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(folder, going)
        shutil.rmtree(going)


def set_aside_later(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step`, from which a resumed run goes another way, so that `latest` passes them."""
    for folder in checkpoint_folders(output_dir):
        if int(folder.name.removeprefix(CHECKPOINT_PREFIX)) > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            logger.warning(f"{folder.name} lies after the step that the run resumes from: it is now {aside.name}.")


def remove_incomplete(output_dir: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    for folder in output_dir.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file below `folder` into it, for `find_damage`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _digest(file)} for file in files
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


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


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
