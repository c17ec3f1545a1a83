"""The real training script in a process of its own, to be stopped and killed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_srepa.py"
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]


def environment(**more: str) -> dict[str, str]:
    """The environment of a run on the CPU that finds the package of this checkout."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, **more}


def start(options: list[str], launcher: list[str] | None = None, **more: str) -> subprocess.Popen[str]:
    """Start the script in a process group of its own, under `launcher` or plainly."""
    command = [*(launcher or [sys.executable]), str(SCRIPT), *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
        start_new_session=True,
    )


def run(options: list[str], launcher: list[str] | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the script to its end."""
    process = start(options, launcher, **more)
    output, _ = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    """Wait until `condition` holds.

    Raises:
        AssertionError: it does not within `seconds`, or the process ends before.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"the run ended with {process.returncode}: {process.communicate()[0][-3000:]}")
        time.sleep(0.02)


def logged_steps(output_dir: Path) -> list[int]:
    """The steps in `metrics.jsonl`, a half-written last line left out."""
    file = output_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def is_alive(pid: int) -> bool:
    """Whether a process runs, zombies not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
