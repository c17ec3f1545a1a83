"""The command `diffusers-srepa`: chooses the subcommand, and ends wrong input in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from diffusers_srepa.cli import cache_latents, convert, sample, train
from diffusers_srepa.errors import close_matches


PROGRAM = "diffusers-srepa"

COMMANDS: dict[str, tuple[Callable[[Sequence[str], str], None], str]] = {
    "train": (train.run, "train a diffusion transformer with representation alignment"),
    "cache-latents": (cache_latents.run, "encode a dataset once, for training with --data.latent_cache"),
    "sample": (sample.run, "draw images from a trained pipeline, or from a checkpoint"),
    "convert": (convert.run, "turn official checkpoints into pipelines, and pipelines into REPA's state dicts"),
}
"""Each subcommand by name: what runs it, given its arguments and its full name, and a line for the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit code is 0 or, after wrong input in one sentence, 2.

    Raises:
        SystemExit: after help, a wrong option (2), or a training run that did not finish (1 or 75).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(format_commands())
        return 0 if arguments else 2
    name = arguments[0]
    if name not in COMMANDS:
        sys.stderr.write(f"error: there is no command {name!r}, {close_matches(name, COMMANDS)}\n")
        return 2
    try:
        COMMANDS[name][0](arguments[1:], f"{PROGRAM} {name}")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def format_commands() -> str:
    """The text of `diffusers-srepa --help`."""
    lines = [f"usage: {PROGRAM} <command> [options]", "", "commands:"]
    lines += [f"  {name:<16}{line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROGRAM} <command> --help lists the options of a command.", ""])
