"""The quickstart's report on a run of two steps: every file is written, and bad samples are said to be bad."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import report  # noqa: E402
from digits import read_digits  # noqa: E402

from diffusers_srepa import Trainer, parse_training_config  # noqa: E402


@pytest.fixture
def short_run(quickstart: Path, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the quickstart's configuration with two steps."""
    monkeypatch.chdir(quickstart.parents[1])
    options = {
        "config": "examples/configs/quickstart.yaml",
        "output_dir": tmp_path / "run",
        "data.dataset": digits_folder,
        "data.cache_dir": tmp_path / "cache",
        "training.max_steps": 2,
        "training.global_batch_size": 4,
        "training.log_every": 1,
        "sampling.num_inference_steps": 2,
        "validation.every": 0,
        "tracking.report_to": "none",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return Trainer(parse_training_config(arguments)).train()


def test_report_of_a_short_run(
    short_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.report(short_run) == 1
    printed = capsys.readouterr()
    assert "of the samples, but at least 90% are expected" in printed.err
    for name in ("samples.png", "loss_curves.png", "similarity_maps.png"):
        file = short_run / "report" / name
        assert str(file) in printed.out
        with Image.open(file) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    with Image.open(short_run / "report" / "samples.png") as picture:
        assert picture.height == 10 * 68 + 4

    monkeypatch.setattr(report, "WANTED_ACCURACY", 0.0)
    assert report.report(short_run, output_dir=short_run / "again") == 0
    # Fixed seeds: the same pictures again.
    again = [(short_run / folder / "samples.png").read_bytes() for folder in ("report", "again")]
    assert again[0] == again[1]


def test_judge_knows_real_digits(digits_folder: Path) -> None:
    images, labels = read_digits(digits_folder, "train")
    judge = report.train_classifier(images[:600], labels[:600])
    images, labels = read_digits(digits_folder, "test")
    assert judge.score(report.classifier_features(images), labels) > 0.95


def test_anchors_are_the_brightest_and_the_darkest_patch() -> None:
    image = torch.full((3, 32, 32), 0.5)
    image[:, 16:24, 8:16] = 0.9
    image[:, 0:8, 24:32] = 0.1
    assert report.pick_anchors(image, (4, 4)) == [(2, 1), (0, 3)]
