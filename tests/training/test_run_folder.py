"""The output folder: other runs are protected, own files are cleared, logs are cut at a resume."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from diffusers_srepa.configuration.sections import DataConfig, TrackingConfig
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.files import write_text
from diffusers_srepa.training.methods.checks import check_names
from diffusers_srepa.training.run_folder import (
    check_output_folder,
    checkpoint_folders,
    clear_output_folder,
    prune_checkpoints,
    truncate_metrics,
)


def _config(folder: Path, **options: object) -> TrainingConfig:
    return TrainingConfig(output_dir=str(folder), **options)


@pytest.mark.parametrize("name", ["config.yaml", "model_index.json", "checkpoint-10"])
def test_a_folder_with_another_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name.startswith("checkpoint") else (tmp_path / name).write_text("")
    with pytest.raises(ConfigurationError, match="holds another run"):
        check_output_folder(_config(tmp_path))
    check_output_folder(_config(tmp_path, resume_from_checkpoint="latest"))
    check_output_folder(_config(tmp_path, overwrite_output_dir=True))


def test_new_and_empty_folders_are_accepted(tmp_path: Path) -> None:
    check_output_folder(_config(tmp_path / "new"))
    check_output_folder(_config(tmp_path))
    # What a killed run, a scheduler and a shell leave there before a run has written anything.
    for name in (".run.lock", ".incomplete-config.yaml.7", "slurm-12.out", "train.log"):
        (tmp_path / name).write_text("")
    check_output_folder(_config(tmp_path))


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for options in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ConfigurationError, match=r"holds no run but a notes.txt: set --output_dir"):
            check_output_folder(_config(tmp_path, **options))


@pytest.mark.parametrize("home", [True, False])
def test_the_root_folder_and_the_home_folder_are_refused(tmp_path: Path, monkeypatch: Any, home: bool) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, what = (tmp_path, "your home folder") if home else (Path("/tmp/.."), "the root of a file system")
    with pytest.raises(ConfigurationError, match=f"is {what}: set --output_dir to"):
        check_output_folder(_config(folder))
    check_output_folder(_config(tmp_path / "runs"))


def test_a_user_s_own_files_are_neither_written_over_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for options in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ConfigurationError, match="holds no run but a README.md"):
            check_output_folder(_config(tmp_path, **options))
    clear_output_folder(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_checkpoint_of_another_run_is_not_mixed_into_a_third(tmp_path: Path) -> None:
    for run in ("one", "two"):
        (tmp_path / run / "checkpoint-3").mkdir(parents=True)
    foreign = str(tmp_path / "one" / "checkpoint-3")
    with pytest.raises(ConfigurationError, match="holds another run"):
        check_output_folder(_config(tmp_path / "two", resume_from_checkpoint=foreign))
    check_output_folder(_config(tmp_path / "one", resume_from_checkpoint=foreign))
    check_output_folder(_config(tmp_path / "new", resume_from_checkpoint=foreign))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        check_output_folder(_config(tmp_path / "file"))


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-best", "checkpoint-3"):
        (tmp_path / name).mkdir()
    names = [folder.name for folder in checkpoint_folders(tmp_path)]
    assert names == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


def test_clearing_leaves_what_is_not_the_run_s(tmp_path: Path) -> None:
    for name in ("transformer", "checkpoint-5", "my-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "abandoned-checkpoint-20").mkdir()
    clear_output_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["my-notes"]


def test_abandoned_checkpoints_count_and_go_first(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "abandoned-checkpoint-9", "abandoned-checkpoint-12"):
        (tmp_path / name).mkdir()
    left = []
    for limit in (None, 3, 2, 1):
        prune_checkpoints(tmp_path, limit)
        left.append(sorted(path.name for path in tmp_path.iterdir()))
    assert len(left[0]) == 4
    assert left[1] == ["abandoned-checkpoint-12", "checkpoint-10", "checkpoint-2"]
    assert left[2:] == [["checkpoint-10", "checkpoint-2"], ["checkpoint-10"]]


def test_metrics_are_cut_after_the_resumed_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (10, 20, 30)]
    file.write_text("\n".join([*lines, '{"step": 40, "lo']))
    truncate_metrics(file, 20)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [10, 20]
    truncate_metrics(tmp_path / "absent.jsonl", 20)


def test_a_full_disk_costs_neither_the_log_nor_the_configuration(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(100))
    (tmp_path / "metrics.jsonl").write_text(lines)
    config = "seed: 0\n"
    write_text(tmp_path / "config.yaml", config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError):
            truncate_metrics(tmp_path / "metrics.jsonl", 50)
        with pytest.raises(OSError):
            write_text(tmp_path / "config.yaml", "seed: 1\n" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_text() == lines and (tmp_path / "config.yaml").read_text() == config
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "config.yaml"}


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\\b", "/tmp/x", ".hidden", "..", "", "a\nb"])
@pytest.mark.parametrize("option", ["project_name", "run_name"])
def test_names_for_trackers_lead_nowhere_else(tmp_path: Path, option: str, name: str) -> None:
    config = _config(tmp_path / "run", data=DataConfig(dataset="images"), tracking=TrackingConfig(**{option: name}))
    with pytest.raises(ConfigurationError, match=rf"^tracking.{option} is .* but must be a name without"):
        config.validate()


def test_names_that_trackers_allow_are_allowed(tmp_path: Path) -> None:
    tracking = TrackingConfig(project_name="My project: v1.2 (ü)", run_name="lr=1e-4, seed 0")
    _config(tmp_path / "run", data=DataConfig(dataset="images"), tracking=tracking).validate()


@pytest.mark.parametrize("section", ["alignment.taps", "alignment.projectors", "teachers"])
def test_names_in_the_configuration_are_no_paths(tmp_path: Path, section: str) -> None:
    config = _config(tmp_path / "run")
    names = {"alignment.taps": config.alignment.taps, "alignment.projectors": config.alignment.projectors}
    names.get(section, config.teachers)["../x"] = 3
    with pytest.raises(ConfigurationError, match=f"^a name in {section} is '../x', but must be a plain name"):
        check_names(config)
