"""The output folder of a run: whose it is, what is in it, which checkpoints are intact and which go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from safetensors import SafetensorError

from diffusers_srepa.configuration.training import RunConfig
from diffusers_srepa.errors import ConfigurationError, in_options, one_line
from diffusers_srepa.files import (
    LOCK_FILE,
    TEMPORARY_PREFIX,
    check_output_place,
    remedy,
    remove_folder,
    sha256,
    write_text,
)


logger = get_logger(__name__)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
CHECKPOINT_PREFIX = "checkpoint-"
ABANDONED_PREFIX = f"abandoned-{CHECKPOINT_PREFIX}"

# What a run leaves in its folder; anything else there is the user's and stays untouched.
OWN_FOLDERS = ("transformer", "vae", "scheduler", "projectors", "validation", "logs")
_OWN_FILES = (CONFIG_FILE, METRICS_FILE, "model_index.json", "README.md", "sample_grid.png")

# What a shell or a scheduler may have begun in the folder before the run starts.
_OUTPUT_OF_LAUNCHERS = (".err", ".log", ".out")


class CheckpointError(OSError):
    """What a run writes could not be written."""


@contextmanager
def writing_to(output_dir: Path, what: str | None = None) -> Iterator[None]:
    """Around all that writes to a run's folder: what the disk refuses becomes one sentence.

    Args:
        output_dir (`Path`): folder of the run.
        what (`str`, *optional*): what could not be written, for the sentence.

    Raises:
        CheckpointError: instead of any other `OSError`, and of what safetensors makes of one.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        saved = checkpoint_folders(output_dir)
        last = f"the last complete checkpoint is {saved[-1].name}" if saved else "there is no complete checkpoint"
        where = f"{what} could not be written to {output_dir}" if what else f"{output_dir} could not be written to"
        raise CheckpointError(
            f"{where} ({one_line(error)}); {last}: {remedy(error)}, then go on with --resume_from_checkpoint latest."
        ) from error


def checkpoint_folders(output_dir: Path, prefix: str = CHECKPOINT_PREFIX) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, or those with another prefix, oldest first."""
    folders = [
        folder
        for folder in output_dir.glob(f"{prefix}*")
        if folder.is_dir() and folder.name.removeprefix(prefix).isdecimal()
    ]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a folder `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])


def check_output_folder(config: RunConfig) -> None:
    """Refuse an output folder that is not this run's to write to, before anything is written to it.

    Raises:
        ConfigurationError: it is a file, cannot be written to, holds another run that is neither resumed nor
            overwritten, or holds no run but something else.
    """
    folder = Path(str(config.output_dir))
    with in_options({"output_dir": "--output_dir"}):
        check_output_place(folder)
    try:
        exists = folder.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"the output folder {str(folder)[:80]!r} cannot be used ({reason}): set another --output_dir."
        ) from None
    if exists and not folder.is_dir():
        raise ConfigurationError(f"the output folder {folder} is a file: set --output_dir to a folder.")
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigurationError(f"the output folder {folder} cannot be written to: set another --output_dir.")
    if not folder.is_dir():
        return
    if not holds_run(folder):
        own = (LOCK_FILE, TEMPORARY_PREFIX)
        others = [
            path.name
            for path in folder.iterdir()
            if not path.name.startswith(own) and path.suffix not in _OUTPUT_OF_LAUNCHERS
        ]
        if others:
            raise ConfigurationError(
                f"the output folder {folder} holds no run but a {min(others)}: set --output_dir to a folder that is "
                "empty or does not exist."
            )
    elif not config.overwrite_output_dir and not _resumes_from_within(config, folder):
        raise ConfigurationError(
            f"the output folder {folder} holds another run: go on with it by --resume_from_checkpoint latest, delete "
            "it by --overwrite_output_dir, or set another --output_dir."
        )


def holds_run(folder: Path) -> bool:
    """Whether a run, finished or not, has been written to `folder`."""
    names = (CONFIG_FILE, "model_index.json")
    return any((folder / name).exists() for name in names) or bool(checkpoint_folders(folder))


def _resumes_from_within(config: RunConfig, folder: Path) -> bool:
    # A checkpoint of another run may start a new folder, never be mixed into a third run's.
    wanted = config.resume_from_checkpoint
    if not wanted:
        return False
    return wanted == "latest" or not Path(wanted).is_dir() or folder.resolve() in Path(wanted).resolve().parents


def clear_output_folder(folder: Path, more_folders: Iterable[str] = ()) -> None:
    """Delete what an earlier run left in `folder`; other files stay, and all of them if there was no run."""
    if not folder.is_dir() or not holds_run(folder):
        return
    for checkpoint in [*checkpoint_folders(folder), *folder.glob(f"{ABANDONED_PREFIX}*")]:
        shutil.rmtree(checkpoint)
    for name in (*OWN_FOLDERS, *more_folders):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)


def truncate_metrics(file: Path, last_step: int) -> None:
    """Drop the logged values after `last_step`, which a resumed run logs again; a half-written last line goes too."""
    if not file.exists():
        return
    kept: list[str] = []
    for line in file.read_text().splitlines():
        record = _parse_record(line)
        if record is not None and record["step"] <= last_step:
            kept.append(line)
    write_text(file, "".join(line + "\n" for line in kept))


def _parse_record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


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


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file below `folder` into it, for `find_damage`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


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
            if sha256(file) != digest:
                return f"{name} has other content than was written"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"
    return None


def prune_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Delete checkpoints beyond `limit`, first the abandoned ones, the oldest first.

    Called after a new one is complete, so one always remains.
    """
    folders = [*checkpoint_folders(output_dir, ABANDONED_PREFIX), *checkpoint_folders(output_dir)]
    for folder in folders[: -limit if limit else 0]:
        remove_folder(folder)


def set_aside_later(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step`, from which a resumed run goes another way, so that `latest` passes them."""
    for folder in checkpoint_folders(output_dir):
        if step_of(folder) > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            logger.warning(f"{folder.name} lies after the step that the run resumes from: it is now {aside.name}.")
