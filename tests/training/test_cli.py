"""The command `diffusers-srepa`, called as the shell calls it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from diffusers_srepa.cli import main
from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.tiny_run import RESOLUTION


def _train(assets: Path, output_dir: Path, *options: str) -> list[dict]:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir), *options]
    Trainer(load_training_config(arguments)).train()
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def _cache(assets: Path, folder: Path, *options: str) -> int:
    arguments = ["--dataset", str(assets / "images"), "--vae", str(assets / "vae"), "--output_dir", str(folder)]
    arguments += ["--resolution", str(RESOLUTION), "--dtype", "float32", "--num_workers", "0", *options]
    return main(["cache-latents", *arguments])


def test_training_from_a_latent_cache_is_the_same_training(assets: Path, tmp_path: Path) -> None:
    assert _cache(assets, tmp_path / "cache") == 0
    direct = _train(assets, tmp_path / "direct")
    cached = _train(assets, tmp_path / "cached", "--data.latent_cache", str(tmp_path / "cache"))
    for one, other in zip(direct, cached, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_flips_need_a_cache_with_flips(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _cache(assets, tmp_path / "plain") == 0
    options = ["--data.horizontal_flip", "--training.max_steps", "2", "--data.latent_cache"]
    with pytest.raises(ValueError, match="flip"):
        _train(assets, tmp_path / "run", *options, str(tmp_path / "plain"))
    assert _cache(assets, tmp_path / "flipped", "--flip") == 0
    direct = _train(assets, tmp_path / "direct", *options[:-1])
    cached = _train(assets, tmp_path / "cached", *options, str(tmp_path / "flipped"))
    assert cached[-1]["loss"] == pytest.approx(direct[-1]["loss"], rel=1e-4)


def test_another_autoencoder_s_cache_is_refused(assets: Path, tmp_path: Path) -> None:
    assert _cache(assets, tmp_path / "cache", "--vae_dtype", "bfloat16") == 0
    with pytest.raises(ValueError, match="cache"):
        _train(assets, tmp_path / "run", "--data.latent_cache", str(tmp_path / "cache"))


def test_samples_are_drawn_by_name_and_number(assets: Path, tmp_path: Path) -> None:
    _train(assets, tmp_path / "run", "--training.max_steps", "1")
    arguments = ["--model", str(tmp_path / "run"), "--num_inference_steps", "2", "--images_per_class", "2"]
    options = ["--class_labels", "dog", "0", "--guidance_scale", "2"]
    assert main(["sample", *arguments, *options, "--output_dir", str(tmp_path / "a")]) == 0
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert [record["class_label"] for record in settings["images"]] == ["dog", "dog", 0, 0]
    assert settings["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert Image.open(tmp_path / "a" / "0003.png").size == (RESOLUTION, RESOLUTION)
    assert main(["sample", *arguments, "--output_dir", str(tmp_path / "all")]) == 0
    assert len(list((tmp_path / "all").glob("0*.png"))) == 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sample", "--model", "no/such/pipeline"], "no/such/pipeline"),
        (["cache-latents", "--dataset", "no/such/images", "--vae", "pixels"], "no/such/images"),
        (["sample", "--model", "x", "--images_per_class", "0"], "--images_per_class is 0"),
    ],
)
def test_wrong_input_ends_in_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "cache-latents" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, options, message",
    [
        ("cache-latents", ["--vae", "VAE", "--dataset", "IMAGES", "--image_column", "foo"], "(option --image_column)"),
        ("cache-latents", ["--vae", "TEACHER", "--dataset", "IMAGES"], "change --vae or --vae_subfolder"),
        ("cache-latents", ["--vae", "VAE", "--dataset", "IMAGES", "--resolution", "17"], "(option --resolution)"),
        ("sample", ["--model", "VAE"], "set --model to a folder that holds a model_index.json"),
        ("sample", ["--model", "RUN", "--class_labels", "unicorn"], "--class_labels cannot be used"),
        ("sample", ["--model", "RUN", "--class_labels", "99"], "--class_labels holds 99, but the classes are 0 to 2"),
        ("sample", ["--model", "RUN", "--num_inference_steps", "0"], "--num_inference_steps is 0"),
        ("sample", ["--model", "RUN", "--device", "foo"], "--device foo cannot be used"),
    ],
)
def test_errors_name_the_options_of_the_subcommand(
    assets: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
    message: str,
) -> None:
    places = {"VAE": assets / "vae", "TEACHER": assets / "teacher", "IMAGES": assets / "images", "RUN": finished}
    words = [str(places.get(option, option)) for option in options]
    assert main([command, *words, "--output_dir", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1] and "data." not in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of a run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    _train(assets, folder, "--training.max_steps", "1")
    return folder
