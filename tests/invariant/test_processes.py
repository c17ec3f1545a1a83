"""The number of processes changes nothing: the real script under the real launcher, on CPU with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.tiny_run import write_assets


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_srepa.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def _run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    full = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=full, timeout=500)


def _losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by one process (folder `one`) and by two (folder `two`)."""
    folder = write_assets(tmp_path_factory.mktemp("runs"))
    # The alignment ends at step 3, so that both also pass the moment in which projector and teacher are dropped.
    stop = {"name": "hard_stop", "step": 3}
    (folder / "stop.yaml").write_text(
        yaml.safe_dump(
            {"alignment": {"terms": {"cosine": {"weight": stop}, "gram_mse": {"weight": {**stop, "value": 2.0}}}}}
        )
    )
    options = [str(SCRIPT), "--config", str(folder / "config.yaml"), "--config", str(folder / "stop.yaml")]
    two = [*LAUNCH, "--multi_gpu", "--num_processes", "2", *options, "--output_dir", str(folder / "two")]
    for command in (
        [sys.executable, *options, "--output_dir", str(folder / "one")],
        [*two, "--expected_processes", "2"],
    ):
        result = _run(command)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_two_processes_train_and_give_the_trajectory_of_one(runs: Path) -> None:
    state = json.loads((runs / "two" / "checkpoint-4" / "state.json").read_text())
    assert state["num_processes"] == 2
    assert _losses(runs / "two") == pytest.approx(_losses(runs / "one"), rel=1e-4)
    one, two = (load_file(runs / name / "checkpoint-4" / "ema.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-4)


def test_a_checkpoint_of_two_processes_resumes_on_one(runs: Path) -> None:
    options = ["--config", str(runs / "two" / "config.yaml"), "--training.max_steps", "6"]
    result = _run(
        [
            sys.executable,
            str(SCRIPT),
            *options,
            "--resume_from_checkpoint",
            "checkpoint-4",
            "--expected_processes",
            "1",
        ]
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(_losses(runs / "two")) == 6


@pytest.mark.parametrize(
    "options, environment, message",
    [
        (["--expected_processes", "2"], {}, "1 processes are running, but expected_processes is 2"),
        ([], {"MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR but not WORLD_SIZE"),
        (["--alignment.depth", "9"], {}, "alignment.depth is 9, but the transformer has blocks 1 to 3"),
    ],
)
def test_the_script_refuses_in_one_sentence(
    runs: Path, options: list[str], environment: dict[str, str], message: str
) -> None:
    arguments = ["--config", str(runs / "config.yaml"), "--output_dir", str(runs / "new")]
    result = _run([sys.executable, str(SCRIPT), *arguments, *options], environment)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr
    assert not (runs / "new" / "config.yaml").exists()
