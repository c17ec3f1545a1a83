"""Runs that are stopped or killed at any moment go on to the weights of the run that never was."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusers_srepa.training.signals import EXIT_CODE
from tests.helpers.launched_run import LAUNCHER, environment, is_alive, logged_steps, run, start, wait_until
from tests.helpers.tiny_run import write_assets


STEPS = 100
ENDLESS = ["--training.max_steps", "100000"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run long enough to be caught in the middle, with loader processes and a weight schedule."""
    folder = write_assets(tmp_path_factory.mktemp("interruptions"))
    more = {
        "alignment": {
            "terms": {"gram_mse": {"weight": {"name": "linear_decay", "initial": 2.0, "final": 0.5, "end": STEPS}}}
        },
        "training": {"max_steps": STEPS, "log_every": 1},
        "optimizer": {"lr_schedule": "cosine"},
        "checkpoints": {"every": 7, "total_limit": 2},
        "data": {"num_workers": 2},
    }
    (folder / "long.yaml").write_text(yaml.safe_dump(more))
    return ["--config", str(folder / "config.yaml"), "--config", str(folder / "long.yaml")]


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run([*options, "--output_dir", str(folder)])
    assert result.returncode == 0, result.stdout[-3000:]
    return folder


def _resume_and_compare(options: list[str], folder: Path, whole: Path) -> None:
    result = run([*options, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
    assert result.returncode == 0, result.stdout[-3000:]
    assert logged_steps(folder) == list(range(1, STEPS + 1))
    files = [
        "raw.safetensors",
        "optimizer_student.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "projectors/default/diffusion_pytorch_model.safetensors",
    ]
    for file in files:
        ours, expected = (load_file(path / f"checkpoint-{STEPS}" / file) for path in (folder, whole))
        assert ours.keys() == expected.keys()
        for name in expected:
            assert torch.equal(ours[name], expected[name]), (file, name)
    values = [json.loads((path / "metrics.jsonl").read_text().splitlines()[-1]) for path in (folder, whole)]
    for name in ("loss", "flow", "alignment/cosine", "alignment/gram_mse", "weight/gram_mse", "lr", "grad_norm"):
        assert values[0][name] == values[1][name], name


def _wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    wait_until(lambda: logged_steps(folder)[-1:] >= [step], process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_the_run_goes_on_exactly(
    options: list[str], whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start([*options, "--output_dir", str(tmp_path / "run")])
    _wait_for_step(process, tmp_path / "run", 10)
    # To the loader processes too, as a terminal's Ctrl-C and a scheduler's end of time.
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE == 75, output[-3000:]
    stopped = re.search(rf"stopped by {number.name} after step (\d+); the newest checkpoint is \S+-(\d+)", output)
    assert stopped is not None and stopped[1] == stopped[2] and "Traceback" not in output
    _resume_and_compare(options, tmp_path / "run", whole)


def test_a_kill_loses_at_most_the_steps_since_the_last_checkpoint(
    options: list[str], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for step in (8, 21, 33):
        resume = ["--resume_from_checkpoint", "latest"]
        process = start([*options, "--output_dir", str(folder), *resume])
        _wait_for_step(process, folder, step)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        saved = [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]
        # The line of step 21 is logged before its checkpoint is written.
        assert max(saved) >= (step - 1) // 7 * 7
    _resume_and_compare(options, folder, whole)
    assert not list(folder.glob(".incomplete-*")) and not (folder / ".run.lock").exists()


def test_the_end_of_the_launcher_stops_the_run_it_started(options: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start([*options, "--output_dir", str(folder)], LAUNCHER)
    _wait_for_step(process, folder, 10)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(int(children[0])), seconds=60)
    output, _ = process.communicate(timeout=30)
    assert "stopped by the end of its launcher" in output
    _resume_and_compare(options, folder, whole)


SET_UP_AND_WAIT = (
    "import os, sys, time\n"
    "from diffusers_srepa import Trainer, TrainingInterrupted, parse_training_config\n"
    "trainer = Trainer(parse_training_config())\n"
    "parent = os.getppid()\n"
    "print('set up', os.getpid(), flush=True)\n"
    "while os.getppid() == parent:\n"
    "    time.sleep(0.02)\n"
    "try:\n"
    "    trainer.train()\n"
    "except TrainingInterrupted as stop:\n"
    "    print(stop, flush=True)\n"
)


def test_the_end_of_the_launcher_before_the_first_step_is_noticed(options: list[str], tmp_path: Path) -> None:
    arguments = [*options, *ENDLESS, "--output_dir", str(tmp_path / "run")]
    shell = subprocess.Popen(
        ["sh", "-c", '"$@" & wait', "sh", sys.executable, "-c", SET_UP_AND_WAIT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(TORCHELASTIC_RUN_ID="none"),
    )
    assert shell.stdout is not None
    child = next(int(line.split()[-1]) for line in shell.stdout if line.startswith("set up"))
    try:
        os.kill(shell.pid, signal.SIGKILL)
        output, _ = shell.communicate(timeout=60)
    finally:
        if is_alive(child):
            os.kill(child, signal.SIGKILL)
    assert "stopped by the end of its launcher after step 1;" in output


def test_without_a_launcher_the_end_of_the_parent_is_no_reason_to_stop(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shell = ["sh", "-c", '"$@" & echo $! ; wait', "sh", sys.executable]
    parent = start([*options, *ENDLESS, "--output_dir", str(folder)], shell)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        _wait_for_step(parent, folder, 3)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(timeout=30)
        before = logged_steps(folder)[-1]
        wait_until(lambda: logged_steps(folder)[-1] >= before + 10)
        assert is_alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("signalled", ["one", "all"])
def test_two_processes_agree_on_the_step_to_stop_at(options: list[str], tmp_path: Path, signalled: str) -> None:
    folder = tmp_path / "run"
    launcher = [*LAUNCHER, "--multi_gpu", "--num_processes", "2"]
    process = start([*options, "--output_dir", str(folder), "--data.num_workers", "0"], launcher)
    _wait_for_step(process, folder, 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    # A scheduler signals all of them, and the launcher passes it on: its processes get it twice.
    for pid in [process.pid, *map(int, children)] if signalled == "all" else [int(children[-1])]:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and re.search(r"stopped by (SIGTERM|a signal to another process)", output)
    newest = max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
    assert newest == logged_steps(folder)[-1]


def test_a_second_run_in_the_same_folder_is_refused(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start([*options, *ENDLESS, "--output_dir", str(folder)])
    try:
        _wait_for_step(process, folder, 8)
        second = run([*options, *ENDLESS, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
        assert second.returncode == 1 and f"is in use by a run that goes on (process {process.pid} on" in second.stdout
        assert "Traceback" not in second.stdout
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
