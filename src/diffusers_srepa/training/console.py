"""What a training script shows on the console."""

from __future__ import annotations

import logging


def set_up_console(level: int = logging.INFO) -> None:
    """Show this package's messages from `level` on, and warnings of everything else, as plain lines."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("diffusers_srepa").setLevel(level)
