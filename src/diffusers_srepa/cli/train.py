"""`diffusers-srepa train`: a training run, and the exit codes that it ends with."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from diffusers_srepa.configuration import command_line
from diffusers_srepa.configuration.training import RunConfig, TrainingConfig
from diffusers_srepa.errors import ConfigurationError, DataError
from diffusers_srepa.training.methods.registry import METHOD_CONFIGS


def run(argv: Sequence[str], prog: str) -> None:
    """Train as the options say; the same run as `examples/train_srepa.py`."""
    config = parse_training_config(argv, prog)

    from diffusers_srepa.training.trainer import Trainer

    with training_exit_codes(config):
        Trainer(config).train()


def parse_training_config(argv: Sequence[str] | None = None, prog: str | None = None) -> TrainingConfig:
    """The configuration of a training script; prints help, or one sentence about a wrong option, and exits.

    Args:
        argv (`Sequence[str]`, *optional*): arguments without the program's name; by default the process's own.
        prog (`str`, *optional*): name of the program in its help.

    Returns:
        `TrainingConfig`: or the class of another method, where `--method` chooses one.
    """
    return command_line.parse_training_config(argv, _explain, METHOD_CONFIGS, prog)


@contextmanager
def training_exit_codes(config: RunConfig) -> Iterator[None]:
    """Around a run that a script starts: messages on the console, and the exit codes of docs/reliability.md.

    Args:
        config (`RunConfig`): the run's.

    Raises:
        SystemExit: 1 with one sentence, what was found, what was expected and which option to change, in place of the
            error that it was; 75 when the run was asked to stop, has saved and can be resumed.
    """
    from diffusers_srepa.training.logging import set_up_console
    from diffusers_srepa.training.signals import TrainingInterrupted

    set_up_console()
    try:
        yield
    except (ConfigurationError, DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except TrainingInterrupted as stop:
        with suppress(OSError):  # The terminal may be gone.
            sys.stderr.write(f"{stop}\n")
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(f"stopped; the checkpoints are in {config.output_dir}, go on with --resume_from_checkpoint latest")


def _explain(config: RunConfig) -> str:
    if not isinstance(config, TrainingConfig):
        return ""
    # Imports the models, and with them torch.
    from diffusers_srepa.training.methods.checks import explain_open_values

    return explain_open_values(config)
