"""Train a SiT with representation alignment.

    accelerate launch examples/train_srepa.py --config examples/configs/sit-xl-2_256_srepa-mse.yaml \
        --data.dataset ILSVRC/imagenet-1k --output_dir runs/xl

`--help` lists every option. Options come from YAML files (`--config`, repeatable, later files win) and from the
command line, which wins over files; `--print_config` shows the whole configuration that results.
"""

import sys
from contextlib import suppress

from diffusers_srepa import (
    ConfigurationError,
    DataError,
    Trainer,
    TrainingInterrupted,
    explain_open_values,
    parse_training_config,
    set_up_console,
)


def main() -> None:
    """Parse, build, train."""
    config = parse_training_config(explain=explain_open_values)
    set_up_console()
    try:
        Trainer(config).train()
    except (ConfigurationError, DataError, FloatingPointError, OSError) as error:
        # One sentence instead of a traceback: what was found, what was expected, which option to change.
        sys.exit(f"error: {error}")
    except TrainingInterrupted as stop:
        # Exit code 75: the run was asked to stop, has saved, and can be resumed.
        with suppress(OSError):  # The terminal may be gone.
            sys.stderr.write(f"{stop}\n")
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(f"stopped; the checkpoints are in {config.output_dir}, go on with --resume_from_checkpoint latest")


if __name__ == "__main__":
    main()
