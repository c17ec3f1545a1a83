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

from diffusers_srepa.pipelines.hub import SiTPipeline
from tests.helpers.tiny_run import write_assets


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_srepa.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
TWO_WITH_DDP = [*LAUNCH, "--multi_gpu"]
TWO_WITH_FSDP = [*LAUNCH, "--use_fsdp", "--fsdp_version", "2"]
AVERAGE = "transformer/diffusion_pytorch_model.safetensors"
WITH_CONFIG_FILE = [*LAUNCH, "--config_file", str(ROOT / "examples" / "accelerate" / "gpus_8_fsdp2.yaml")]
WITH_CONFIG_FILE += ["--mixed_precision", "no"]


def _run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    full = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=full, timeout=500)


def _losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by one process (folder `one`), by two (`two`), and by two with FSDP2 (`sharded`)."""
    folder = write_assets(tmp_path_factory.mktemp("runs"))
    # The alignment ends at step 3, so that both also pass the moment in which projector and teacher are dropped.
    stop = {"name": "hard_stop", "step": 3}
    (folder / "stop.yaml").write_text(
        yaml.safe_dump(
            {"alignment": {"terms": {"cosine": {"weight": stop}, "gram_mse": {"weight": {**stop, "value": 2.0}}}}}
        )
    )
    options = [str(SCRIPT), "--config", str(folder / "config.yaml"), "--config", str(folder / "stop.yaml")]
    several = ["--expected_processes", "2", "--output_dir"]
    for command in (
        [sys.executable, *options, "--output_dir", str(folder / "one")],
        [*TWO_WITH_DDP, *options, *several, str(folder / "two")],
        [*TWO_WITH_FSDP, *options, *several, str(folder / "sharded"), "--validation.every", "4"],
    ):
        result = _run(command)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_two_processes_train_and_give_the_trajectory_of_one(runs: Path, name: str) -> None:
    state = json.loads((runs / name / "checkpoint-4" / "state.json").read_text())
    assert state["num_processes"] == 2
    assert _losses(runs / name) == pytest.approx(_losses(runs / "one"), rel=1e-4)
    for file in ("raw.safetensors", "optimizer_student.safetensors", AVERAGE):
        one, two = (load_file(runs / run / "checkpoint-4" / file) for run in ("one", name))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-4, msg=lambda text, key=key: key + text)


def test_half_precision_is_the_same_with_and_without_sharding(runs: Path, tmp_path: Path) -> None:
    options = [str(SCRIPT), "--config", str(runs / "config.yaml"), "--training.mixed_precision", "bf16"]
    for launch, name in (([sys.executable], "one"), (TWO_WITH_FSDP, "sharded")):
        result = _run([*launch, *options, "--training.max_steps", "2", "--output_dir", str(tmp_path / name)])
        assert result.returncode == 0, result.stderr[-3000:]
    # In full precision the first loss would differ by 3e-4.
    assert _losses(tmp_path / "sharded")[0] == pytest.approx(_losses(tmp_path / "one")[0], rel=1e-5)
    assert _losses(tmp_path / "sharded")[0] != pytest.approx(_losses(runs / "one")[0], rel=1e-4)


def test_a_sharded_run_leaves_whole_weights_a_pipeline_and_pictures(runs: Path) -> None:
    one, sharded = (SiTPipeline.from_pretrained(runs / name) for name in ("one", "sharded"))
    for name, weight in sharded.transformer.named_parameters():
        torch.testing.assert_close(weight, one.transformer.get_parameter(name), rtol=1e-3, atol=2e-4)
    assert (runs / "sharded" / "validation" / "step-4" / "grid.png").exists()
    average = load_file(runs / "sharded" / "checkpoint-4" / AVERAGE)
    for name, weight in sharded.transformer.named_parameters():
        assert torch.equal(weight, average[name]), name


@pytest.mark.parametrize(
    "written, launch",
    [("two", [sys.executable]), ("sharded", [sys.executable]), ("one", WITH_CONFIG_FILE), ("sharded", TWO_WITH_DDP)],
)
def test_a_checkpoint_resumes_on_any_number_and_kind_of_processes(
    runs: Path, tmp_path: Path, written: str, launch: list[str]
) -> None:
    options = ["--config", str(runs / "one" / "config.yaml"), "--output_dir", str(tmp_path / "run")]
    checkpoint = str(runs / written / "checkpoint-2")
    result = _run([*launch, str(SCRIPT), *options, "--resume_from_checkpoint", checkpoint])
    assert result.returncode == 0, result.stderr[-3000:]
    assert _losses(tmp_path / "run") == pytest.approx(_losses(runs / "one")[2:], rel=1e-4)
    one, other = (load_file(path / "checkpoint-4" / AVERAGE) for path in (runs / "one", tmp_path / "run"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=2e-4)


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
