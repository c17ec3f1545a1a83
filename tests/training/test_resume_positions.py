"""The position in an epoch of a map-style dataset survives stops and kills, with any number of loader processes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.errors import DataError
from diffusers_srepa.training.trainer import Trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images, of which a global batch of 8 leaves 4 out per epoch, two of them unreadable."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        for index in range(10):
            Image.new("RGB", (20, 18), (index * 25, number * 90, 7 * index)).save(folder / name / f"{index}.png")
    (folder / "cat" / "4.png").write_bytes(b"garbage")
    (folder / "dog" / "0.png").write_bytes(b"")
    return folder


def _arguments(assets: Path, images: Path, output_dir: Path, *options: str) -> list[str]:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir)]
    return [*arguments, "--data.dataset", str(images), "--data.horizontal_flip", "true", *options]


def _trainer(assets: Path, images: Path, output_dir: Path, *options: str) -> Trainer:
    return Trainer(load_training_config(_arguments(assets, images, output_dir, *options)))


def _digests(checkpoint: Path) -> dict[str, str]:
    left_out = ("config.yaml", "manifest.json")
    return {
        str(file.relative_to(checkpoint)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and (file.parent != checkpoint or file.name not in left_out)
    }


def _losses(folder: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["replaced_images"]) for record in records]


@pytest.mark.parametrize("stop", ["1", "3"], ids=["inside the first epoch", "inside the second"])
def test_stopping_and_resuming_with_loader_processes_changes_nothing(
    assets: Path, images: Path, tmp_path: Path, stop: str
) -> None:
    # An epoch is two steps.
    options = ["--checkpoints.every", "100", "--data.num_workers"]
    _trainer(assets, images, tmp_path / "whole", *options, "2", "--training.max_steps", "5").train()
    _trainer(assets, images, tmp_path / "halves", *options, "2", "--training.max_steps", stop).train()
    again = ["--training.max_steps", "5", "--resume_from_checkpoint", "latest"]
    _trainer(assets, images, tmp_path / "halves", *options, "1", *again).train()
    assert _digests(tmp_path / "whole" / "checkpoint-5") == _digests(tmp_path / "halves" / "checkpoint-5")
    assert _losses(tmp_path / "whole") == _losses(tmp_path / "halves")
    assert _losses(tmp_path / "whole")[-1][2] > 0


SCRIPT = (
    "import sys\n"
    "from diffusers_srepa.configuration.command_line import load_training_config\n"
    "from diffusers_srepa.training.trainer import Trainer\n"
    "Trainer(load_training_config(sys.argv[1:])).train()\n"
)


def test_a_killed_run_resumes_to_the_same_weights(assets: Path, images: Path, tmp_path: Path) -> None:
    options = ["--data.num_workers", "2", "--checkpoints.every", "1", "--training.max_steps"]
    run = tmp_path / "killed"
    arguments = _arguments(assets, images, run, *options, "4000")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 90
        while not (run / "checkpoint-3" / "manifest.json").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (run / "run.lock").unlink(missing_ok=True)
    done = max(int(folder.name.removeprefix("checkpoint-")) for folder in run.glob("checkpoint-*"))
    last = str(done + 3)
    _trainer(assets, images, run, *options, last, "--resume_from_checkpoint", "latest").train()
    _trainer(assets, images, tmp_path / "whole", *options, last).train()
    assert _digests(run / f"checkpoint-{last}") == _digests(tmp_path / "whole" / f"checkpoint-{last}")
    assert _losses(run) == _losses(tmp_path / "whole")


class _KilledAt(torch.utils.data.Dataset):
    """A dataset whose loader process is killed when it reads a sample of the given step."""

    def __init__(self, dataset, step: int) -> None:
        self.dataset, self.step = dataset, step
        self.fingerprint = dataset.fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key):
        if key.step == self.step and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.dataset[key]


def test_a_loader_process_that_dies_ends_the_run_and_a_resume_mends_it(
    assets: Path, images: Path, tmp_path: Path
) -> None:
    options = ["--data.num_workers", "1", "--checkpoints.every", "1"]
    _trainer(assets, images, tmp_path / "whole", *options).train()
    trainer = _trainer(assets, images, tmp_path / "run", *options)
    trainer.dataset = _KilledAt(trainer.dataset, 3)
    with pytest.raises(DataError, match=r"^one of the 1 loader process.* data.num_workers, and .* latest\.$") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    resumed = _trainer(assets, images, tmp_path / "run", *options, "--resume_from_checkpoint", "latest")
    # The loader reads two batches ahead, so that it dies while an earlier step is trained.
    assert 1 <= resumed.step <= 3
    resumed.train()
    assert _digests(tmp_path / "whole" / "checkpoint-4") == _digests(tmp_path / "run" / "checkpoint-4")


def test_a_fatal_image_is_one_sentence_also_from_a_loader_process(assets: Path, images: Path, tmp_path: Path) -> None:
    options = ["--data.num_workers", "2", "--data.on_bad_image", "raise"]
    trainer = _trainer(assets, images, tmp_path / "run", *options)
    with pytest.raises(DataError, match=r"^the image of row (4|10) of the dataset .*data.on_bad_image to skip\.$"):
        trainer.train()
