"""`diffusers-srepa train` is the run of examples/train_srepa.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusers_srepa.cli.train import training_exit_codes
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import DataError
from diffusers_srepa.training.signals import TrainingInterrupted
from tests.helpers.launched_run import SCRIPT, environment


def _metrics(assets: Path, output_dir: Path, start: list[str]) -> list[dict[str, Any]]:
    words = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir)]
    result = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if "per_second" not in key} for line in lines]


def test_the_command_and_the_script_train_the_same(assets: Path, tmp_path: Path) -> None:
    script = _metrics(assets, tmp_path / "script", [str(SCRIPT)])
    command = _metrics(assets, tmp_path / "command", ["-m", "diffusers_srepa.cli", "train"])
    assert len(script) == 4 and script == command
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "script" / weights).read_bytes() == (tmp_path / "command" / weights).read_bytes()


@pytest.mark.parametrize(
    "raised, code",
    [
        (DataError("no image."), "error: no image."),
        (FloatingPointError("loss."), "error: loss."),
        (OSError("disk"), "error: disk"),
        (TrainingInterrupted("saved."), 75),
        (KeyboardInterrupt(), "stopped; the checkpoints are in runs, go on with --resume_from_checkpoint latest"),
    ],
)
def test_what_ends_a_run_becomes_an_exit_code(raised: BaseException, code: int | str) -> None:
    with pytest.raises(SystemExit) as leave, training_exit_codes(TrainingConfig(output_dir="runs")):
        raise raised
    assert leave.value.code == code


def test_what_is_a_defect_stays_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError), training_exit_codes(TrainingConfig(output_dir="runs")):
        raise ZeroDivisionError
