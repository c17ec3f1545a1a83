"""The command itself: its ways to be started, its help, its exit codes, and what it does not import."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from diffusers_srepa.cli.cache_latents import CacheLatentsOptions
from diffusers_srepa.cli.convert import ConvertOptions
from diffusers_srepa.cli.main import COMMANDS, main
from diffusers_srepa.cli.sample import SampleOptions
from diffusers_srepa.configuration.options import options_of
from diffusers_srepa.configuration.training import TrainingConfig
from tests.helpers.launched_run import LAUNCHER, ROOT, environment


CLASSES = {
    "train": TrainingConfig,
    "cache-latents": CacheLatentsOptions,
    "sample": SampleOptions,
    "convert": ConvertOptions,
}


def test_help_lists_the_commands(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS) and set(COMMANDS) == set(CLASSES)
    assert call() == 2 and "usage: diffusers-srepa" in capsys.readouterr().err


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_has_help(name: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: diffusers-srepa {name} [options]" in text and "--config" in text
    for option, declared in options_of(CLASSES[name]).items():
        assert declared.help, option
        assert f"--{option} " in text or f"\n{option}:" in text, option


@pytest.mark.parametrize("name", CLASSES)
def test_help_and_wrong_options_import_nothing_heavy(name: str) -> None:
    script = (
        "import sys\n"
        "from diffusers_srepa.cli.main import main\n"
        "for option, code in (('--help', 0), ('--nonsense', 2)):\n"
        f"    try:\n        main(['{name}', option])\n"
        "    except SystemExit as leave:\n        assert leave.code == code, leave.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'datasets', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    assert result.stderr == "error: there is no option --nonsense: --help lists them all.\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["smaple"], "there is no command 'smaple', did you mean 'sample'?"),
        (["--model", "x"], "there is no command '--model'"),
        (["sample", "x"], "there is no place for 'x'"),
        (["sample", "--model", "x"], "no output_dir is given: set --output_dir."),
        (["sample", "--model", "x", "--output_dir", "y", "--images_per_class", "0"], "images_per_class is 0"),
        (["train", "--learning_rate", "1"], "there is no option --learning_rate: here it is --optimizer.lr."),
        (["train", "--output_dir", "y"], "no dataset is given: set --data.dataset"),
        (["convert", "--checkpoint", "x", "--output_dir", "y", "--sample_size", "3"], "sample_size"),
        (["convert", "--checkpoint", "x", "--output_dir", "y", "--scheduler", "ddim"], "scheduler is 'ddim'"),
    ],
)
def test_wrong_options_end_in_one_sentence(
    words: list[str], message: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error


def test_options_come_from_files_too(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(f"model: no/such\noutput_dir: {tmp_path / 'out'}\nsteps: 3\n")
    assert call("sample", "--config", tmp_path / "a.yaml") == 2
    assert "there is no option steps" in capsys.readouterr().err
    (tmp_path / "a.yaml").write_text(f"model: no/such\noutput_dir: {tmp_path / 'out'}\nclass_labels: [0, dog]\n")
    assert call("sample", "--config", tmp_path / "a.yaml") == 2
    assert "no pipeline can be loaded from no/such" in capsys.readouterr().err


def test_the_console_script_is_main() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["diffusers-srepa"].partition(":")
    assert getattr(import_module(module), name) is main


@pytest.mark.parametrize("start", [[sys.executable], [*LAUNCHER, "--num_processes", "1"]], ids=["python", "launcher"])
def test_the_module_can_be_started(start: list[str]) -> None:
    result = subprocess.run(
        [*start, "-m", "diffusers_srepa.cli", "sample", "--help"], capture_output=True, text=True, env=environment()
    )
    assert result.returncode == 0, result.stderr
    assert "--num_inference_steps" in result.stdout


def test_a_training_ends_with_its_exit_codes(
    assets: Path, call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", assets / "config.yaml", "--output_dir", tmp_path / "run"]
    assert call(*words, "--training.max_steps", 0) == 2
    with pytest.raises(SystemExit, match="error: .*no/such/images"):
        main([*map(str, words), "--data.dataset", "no/such/images"])
