"""`diffusers-srepa cache-latents`: caches for training, from options or the configuration of a training run."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState

from diffusers_srepa.cli.cache_latents import CacheLatentsOptions, read_files
from diffusers_srepa.configuration.command_line import load_config, load_training_config
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.launched_run import LAUNCHER, environment
from tests.helpers.tiny_run import RESOLUTION


@pytest.fixture
def cache(assets: Path, call: Callable[..., int]) -> Callable[..., int]:
    """Writes a cache of the assets."""

    def run(folder: Path, *options: Any) -> int:
        words = ["--data.dataset", assets / "images", "--latents.vae", assets / "vae", "--output_dir", folder]
        words += ["--data.resolution", RESOLUTION, "--dtype", "float32", "--num_workers", 0]
        return call("cache-latents", *words, *options)

    return run


def _layout(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "latents.json").read_text())


def _refused(assets: Path, output_dir: Path, *options: Any) -> None:
    """Trains without the command, which makes an exit code of the error."""
    words = ["--config", assets / "config.yaml", "--output_dir", output_dir, *options]
    try:
        Trainer(load_training_config(list(map(str, words)))).train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_training_from_a_latent_cache_is_the_same_training(cache: Any, train: Any, tmp_path: Path) -> None:
    assert cache(tmp_path / "cache") == 0
    direct = train(tmp_path / "direct")
    cached = train(tmp_path / "cached", "--data.latent_cache", tmp_path / "cache")
    for one, other in zip(direct, cached, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_flips_need_a_cache_with_flips(assets: Path, cache: Any, train: Any, tmp_path: Path) -> None:
    assert cache(tmp_path / "plain") == 0
    options = ["--data.horizontal_flip", "--training.max_steps", "2"]
    with pytest.raises(ValueError, match="flip"):
        _refused(assets, tmp_path / "run", *options, "--data.latent_cache", tmp_path / "plain")
    assert cache(tmp_path / "flipped", "--flip") == 0
    direct = train(tmp_path / "direct", *options)
    cached = train(tmp_path / "cached", *options, "--data.latent_cache", tmp_path / "flipped")
    assert cached[-1]["loss"] == pytest.approx(direct[-1]["loss"], rel=1e-4)


def test_another_autoencoder_s_cache_is_refused(assets: Path, cache: Any, tmp_path: Path) -> None:
    assert cache(tmp_path / "cache", "--latents.dtype", "bfloat16") == 0
    with pytest.raises(ValueError, match="cache"):
        _refused(assets, tmp_path / "run", "--data.latent_cache", tmp_path / "cache")


def test_the_configuration_of_a_training_run_will_do(assets: Path, call: Any, train: Any, tmp_path: Path) -> None:
    run = {
        "base": str(assets / "config.yaml"),
        "output_dir": str(tmp_path / "run"),
        "data": {"latent_cache": str(tmp_path / "cache"), "streaming": False},
        "flow": {"timestep_law": "uniform"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert call("cache-latents", "--config", tmp_path / "run.yaml") == 2, "the run's folder is not the cache's"
    words = ["--config", tmp_path / "run.yaml", "--output_dir", tmp_path / "cache", "--num_workers", 0]
    assert call("cache-latents", *words) == 0
    assert not (tmp_path / "run").exists()
    assert (_layout(tmp_path / "cache")["resolution"], _layout(tmp_path / "cache")["flip"]) == (RESOLUTION, False)
    assert len(train(tmp_path / "run", "--config", tmp_path / "run.yaml", "--training.max_steps", 1)) == 1


def test_a_variant_of_a_sweep_says_what_to_cache(tmp_path: Path) -> None:
    text = "data: {dataset: images}\nsweep:\n  low: {data: {resolution: 64}}\n  repa: {alignment: {preset: repa}}\n"
    (tmp_path / "sweep.yaml").write_text(text)
    words = ["--output_dir", "out", "--config", str(tmp_path / "sweep.yaml"), "--variant", "low"]
    options = load_config(words, CacheLatentsOptions, read_files=read_files)
    assert (options.data.dataset, options.data.resolution, options.flip) == ("images", 64, False)


def test_a_run_that_flips_needs_flips_in_its_cache(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {dataset: images, horizontal_flip: true}\n")
    words = ["--output_dir", "out", "--config", str(tmp_path / "run.yaml")]
    assert load_config(words, CacheLatentsOptions, read_files=read_files).flip
    assert not load_config([*words, "--flip", "false"], CacheLatentsOptions, read_files=read_files).flip


@pytest.mark.parametrize("text", ["optimizer: {lrr: 1}", "data: {datset: x}", "batchsize: 4", "latents: {flip: true}"])
def test_unknown_names_in_a_file_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match="there is no option"):
        load_config(["--config", str(tmp_path / "run.yaml")], CacheLatentsOptions, read_files=read_files)


def test_options_of_the_command_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache.yaml").write_text("batch_size: 7\nflip: true\ndata: {dataset: images}\n")
    words = ["--config", str(tmp_path / "cache.yaml"), "--output_dir", "out"]
    options = load_config(words, CacheLatentsOptions, read_files=read_files)
    assert (options.batch_size, options.flip, options.output_dir) == (7, True, "out")


@pytest.mark.parametrize(
    "given, message",
    [
        ("--dataset x", "there is no option --dataset: here it is --data.dataset."),
        ("--vae x", "there is no option --vae: here it is --latents.vae."),
        ("--resolution 8", "here it is --data.resolution."),
        ("--vae_dtype bfloat16", "here it is --latents.dtype."),
        ("--vae_subfolder x", "here it is --latents.subfolder."),
        ("--vae_revision x", "here it is --latents.revision."),
        ("--split x", "here it is --data.split."),
        ("--name x", "here it is --data.name."),
        ("--on_bad_image skip", "here it is --data.on_bad_image."),
        ("--revision x", "did you mean '--data.revision' or '--latents.revision'?"),
        ("--data.streaming", "there is no option --data.streaming"),
        ("--data.horizontal_flip", "there is no option --data.horizontal_flip: here it is --flip."),
        ("--data.num_workers 2", "here it is --num_workers."),
    ],
)
def test_names_of_before_and_of_training_are_answered(given: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load_config(given.split(), CacheLatentsOptions)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data.image_column", "foo"], "(option --data.image_column)"),
        (["--data.dataset", "no/such/images"], "no/such/images"),
        (["--data.resolution", "17"], "--data.resolution"),
        (["--latents.vae", "TEACHER"], "change --latents.vae or --latents.subfolder"),
        (["--batch_size", "0"], "batch_size is 0"),
    ],
)
def test_errors_name_the_options(
    assets: Path, cache: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    words = [assets / "teacher" if option == "TEACHER" else option for option in options]
    assert cache(tmp_path / "out", *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and "`" not in error
    assert not (tmp_path / "out").exists()


def test_processes_share_the_work(assets: Path, cache: Any, tmp_path: Path) -> None:
    words = ["--config", str(assets / "config.yaml"), "--dtype", "float32", "--num_workers", "0"]
    command = [*LAUNCHER, "--multi_gpu", "--num_processes", "2", "-m", "diffusers_srepa.cli", "cache-latents"]
    result = subprocess.run(
        [*command, *words, "--output_dir", str(tmp_path / "shared")], capture_output=True, text=True, env=environment()
    )
    assert result.returncode == 0, result.stderr
    assert cache(tmp_path / "alone") == 0
    assert _layout(tmp_path / "shared") == _layout(tmp_path / "alone")
    (one,), (other,) = (sorted((tmp_path / name).glob("shard_*.bin")) for name in ("shared", "alone"))
    assert one.read_bytes() == other.read_bytes()


def test_the_dataset_s_folder_and_those_of_others_are_refused(
    assets: Path, cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(assets.rglob("*"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    refused = {
        assets / "images": "lies in the dataset",
        assets / "images" / "latents": "lies in the dataset",
        tmp_path: "is your home folder: set --output_dir",
        Path("/"): "is the root of a file system: set --output_dir",
        tmp_path / "used": "is not empty (notes.txt) and holds no latent cache: change --output_dir",
    }
    for folder, message in refused.items():
        assert cache(folder) == 2
        assert message in capsys.readouterr().err
    assert sorted(assets.rglob("*")) == before
    assert [file.name for file in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_verify_checks_a_cache_and_writes_nothing(
    cache: Any, call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache(tmp_path / "cache") == 0
    words = ["cache-latents", "--verify", "--output_dir", tmp_path / "cache"]
    assert call(*words) == 0
    assert "1 shards" in capsys.readouterr().out
    shard = tmp_path / "cache" / "shard_00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert call(*words) == 2
    assert "shard_00000.bin has other content than was written" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == before
    assert cache(tmp_path / "cache") == 0 == call(*words)
