"""The quickstart in one process: train a tiny SiT with sREPA on real digits, then look at what it learnt.

    python examples/quickstart/run.py --run_dir runs/quickstart

`make quickstart` runs this after setting everything up. Training is `examples/train_srepa.py` with
`examples/configs/quickstart.yaml`; the pictures and the accuracy come from `examples/quickstart/report.py`.
"""

import argparse
import os
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def main() -> int:
    """Train, then report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default="runs/quickstart", help="where everything is written")
    run_dir = Path(parser.parse_args().run_dir).resolve()
    # The paths in the configuration are relative to the repository; nothing here needs a network.
    os.chdir(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.perf_counter()

    from diffusers_srepa import Trainer, parse_training_config, set_up_console

    set_up_console()
    arguments = ["--config", "examples/configs/quickstart.yaml", "--output_dir", str(run_dir)]
    Trainer(parse_training_config([*arguments, "--overwrite_output_dir"])).train()
    print(f"\ntrained in {time.perf_counter() - started:.0f} s; now sampling and measuring")

    import report

    return report.report(run_dir)


if __name__ == "__main__":
    sys.exit(main())
