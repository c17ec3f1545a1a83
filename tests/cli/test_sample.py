"""`diffusers-srepa sample`: images from a pipeline or a checkpoint, and what it may overwrite."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_run import RESOLUTION


STEPS = ("--num_inference_steps", 2)


def test_samples_are_drawn_by_name_and_number(call: Any, finished: Path, tmp_path: Path) -> None:
    options = ["--images_per_class", "2", *STEPS, "--model", finished]
    chosen = ["--class_labels", "dog", "0", "--guidance_scale", "2"]
    assert call("sample", *options, *chosen, "--output_dir", tmp_path / "a") == 0
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert [record["class_label"] for record in settings["images"]] == ["dog", "dog", 0, 0]
    assert settings["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert Image.open(tmp_path / "a" / "0003.png").size == (RESOLUTION, RESOLUTION)
    assert call("sample", *options, "--output_dir", tmp_path / "all") == 0
    assert len(list((tmp_path / "all").glob("0*.png"))) == 6


def test_a_class_may_be_called_like_a_number(call: Any, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["id2label"] = {"0": "2", "1": "no", "2": "newt"}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    words = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--class_labels", "2", "no", "1"]
    assert call("sample", *words, *STEPS) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert [record["class_label"] for record in settings["images"]] == ["2", "no", 1]


def test_a_checkpoint_is_sampled_from(call: Any, finished: Path, tmp_path: Path) -> None:
    for name, model in (("end", finished), ("last", finished / "checkpoint-2"), ("first", finished / "checkpoint-1")):
        words = ["--model", model, "--output_dir", tmp_path / name, "--class_labels", "dog", *STEPS]
        assert call("sample", *words) == 0, name
    pictures = {name: np.asarray(Image.open(tmp_path / name / "0000.png")) for name in ("end", "last", "first")}
    assert np.array_equal(pictures["end"], pictures["last"])
    assert not np.array_equal(pictures["end"], pictures["first"])


def test_only_earlier_images_are_overwritten(
    call: Any, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--model", finished, "--output_dir", tmp_path / "out", *STEPS]
    (tmp_path / "out").mkdir()
    assert call(*words) == 0, "an empty folder is as good as none"
    assert call(*words, "--class_labels", "dog") == 2
    assert "holds earlier images: replace them by --overwrite" in capsys.readouterr().err
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert call(*words, "--class_labels", "unicorn", "--overwrite") == 2
    assert len(list((tmp_path / "out").glob("0*.png"))) == 3, "they go when there are new ones"
    assert call(*words, "--class_labels", "dog", "--overwrite") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "0000.png",
        "grid.png",
        "settings.json",
        "notes.txt",
    }


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": []}', '{"scheduler": 1, "images": 3}'])
def test_other_folders_are_left_alone(
    content: str, call: Any, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text(content)
    assert call("sample", "--model", finished, "--output_dir", tmp_path, "--overwrite") == 2
    assert "is not empty and holds no earlier images" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("command", ["sample", "convert --vae pixels", "convert --to repa"])
def test_the_root_folder_is_refused(
    command: str, call: Any, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "--model" if command == "sample" else "--checkpoint"
    assert call(*command.split(), source, finished, "--output_dir", "/") == 2
    assert "/ is the root of a file system: set --output" in capsys.readouterr().err


def test_a_file_is_no_folder(call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert call("sample", "--model", "x", "--output_dir", tmp_path / "out") == 2
    assert "is a file: set --output_dir to a folder." in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "VAE"], "set --model to a folder that holds a model_index.json"),
        (["--model", "no/such/pipeline"], "no/such/pipeline"),
        (["--model", "FORMAT_1"], "is a checkpoint of an older format"),
        (["--model", "RUN", "--class_labels", "unicorn"], "--class_labels cannot be used"),
        (["--model", "RUN", "--class_labels", "99"], "--class_labels holds 99, but the classes are 0 to 2"),
        (["--model", "RUN", "--num_inference_steps", "0"], "num_inference_steps is 0"),
        (["--model", "RUN", "--device", "foo"], "--device foo cannot be used"),
    ],
)
def test_errors_name_the_options(
    assets: Path,
    finished: Path,
    call: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    old = Path(__file__).resolve().parents[1] / "fixtures/format_1/run/checkpoint-2"
    places = {"VAE": assets / "vae", "RUN": finished, "FORMAT_1": old}
    words = [places.get(option, option) for option in options]
    assert call("sample", *words, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()
