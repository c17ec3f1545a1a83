"""The output folder of a run: whose it is, what is in it, where things go."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import ConfigurationError


CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_PREFIX = "checkpoint-"

# What a run leaves in its folder; anything else there is the user's and stays untouched.
_OWN_FOLDERS = ("transformer", "vae", "scheduler", "projectors", "validation", "logs")
_OWN_FILES = (CONFIG_FILE, METRICS_FILE, "model_index.json", "README.md", "sample_grid.png")


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, oldest first."""
    folders = [
        folder
        for folder in output_dir.glob(f"{CHECKPOINT_PREFIX}*")
        if folder.is_dir() and folder.name.removeprefix(CHECKPOINT_PREFIX).isdigit()
    ]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix(CHECKPOINT_PREFIX)))


def check_output_folder(config: TrainingConfig) -> None:
    """Refuse an output folder that is not this run's to write to, before anything is written to it.

    Raises:
        ConfigurationError: it is a file, cannot be written to, holds another run that is neither resumed nor
            overwritten, or holds somebody's files under names that the run would write.
    """
    folder = Path(str(config.output_dir))
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
        taken = [name for name in (*_OWN_FOLDERS, *_OWN_FILES) if (folder / name).exists()]
        if taken:
            raise ConfigurationError(
                f"the output folder {folder} holds no run but a {taken[0]}, which training would write: set another "
                "--output_dir."
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


def _resumes_from_within(config: TrainingConfig, folder: Path) -> bool:
    # A checkpoint of another run may start a new folder, never be mixed into a third run's.
    wanted = config.resume_from_checkpoint
    if not wanted:
        return False
    return wanted == "latest" or not Path(wanted).is_dir() or folder.resolve() in Path(wanted).resolve().parents


def clear_output_folder(folder: Path) -> None:
    """Delete what an earlier run left in `folder`; other files stay, and all of them if there was no run."""
    if not folder.is_dir() or not holds_run(folder):
        return
    for checkpoint in [*checkpoint_folders(folder), *folder.glob(f"abandoned-{CHECKPOINT_PREFIX}*")]:
        shutil.rmtree(checkpoint)
    for name in _OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)


def write_config(config: TrainingConfig, folder: Path) -> None:
    """Write the resolved configuration as YAML; `--config <file>` gives the same run again."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace_text(folder / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))


def truncate_metrics(file: Path, last_step: int) -> None:
    """Drop the logged values after `last_step`, which a resumed run logs again; a half-written last line goes too."""
    if not file.exists():
        return
    kept: list[str] = []
    for line in file.read_text().splitlines():
        record = _parse_record(line)
        if record is not None and record["step"] <= last_step:
            kept.append(line)
    _replace_text(file, "".join(line + "\n" for line in kept))


def _replace_text(file: Path, text: str) -> None:
    """Write a file such that whatever happens either the old content is there or the new one."""
    new = file.with_name(f".{file.name}.new")
    try:
        with new.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def _parse_record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
