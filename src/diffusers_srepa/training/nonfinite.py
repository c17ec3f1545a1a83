"""Steps whose loss or gradient is not finite: they are skipped, and too many in a row end the run."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.logging import get_logger

from diffusers_srepa.training.run_folder import checkpoint_folders, step_of


logger = get_logger(__name__)


def poison_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, with a gradient of NaN if it is not finite.

    The gradient's norm, equal on all processes, then tells every process of a bad loss on one of them.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)


class NonFiniteGuard:
    """Counts the steps that were skipped, and knows up to which step the weights are good.

    Args:
        limit (`int`): skipped steps in a row that are let pass.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped_steps = 0
        self._in_a_row = 0
        self._proven_step = 0

    def restore(self, step: int, skipped_steps: int) -> None:
        """Go on after `step` of a run that had skipped `skipped_steps`."""
        # It is the step after a checkpoint that tells whether its weights are good.
        self.skipped_steps, self._in_a_row, self._proven_step = skipped_steps, 0, max(step - 1, 0)

    def note(self, step: int, finite: bool) -> None:
        """Count a step.

        Args:
            step (`int`): steps made before this one.
            finite (`bool`): whether the weights after `step` steps gave a finite loss and gradient.
        """
        if finite:
            self._in_a_row, self._proven_step = 0, step
            return
        self.skipped_steps += 1
        self._in_a_row += 1
        logger.warning(
            f"step {step + 1}: loss or gradient is not finite, the step is skipped ({self._in_a_row} in a row)"
        )

    def check(self, step: int, output_dir: Path, let_pass: int | None = None) -> None:
        """End the run after too many skipped steps in a row.

        Args:
            step (`int`): steps made.
            output_dir (`Path`): folder of the run.
            let_pass (`int`, *optional*): how many in a row are let pass here; by default the limit.

        Raises:
            FloatingPointError: naming the last checkpoint whose weights gave a finite loss.
        """
        if self._in_a_row <= (self.limit if let_pass is None else let_pass):
            return
        good = [folder for folder in checkpoint_folders(output_dir) if step_of(folder) <= self._proven_step]
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
        raise FloatingPointError(
            f"loss or gradient was not finite in the last {self._in_a_row} step(s) up to step {step} (at most "
            f"{self.limit} in a row are skipped, training.max_skipped_steps); {last}: lower optimizer.lr, or check "
            "the data."
        )
