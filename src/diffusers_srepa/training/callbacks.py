"""Points of a run at which code of the user's is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class TrainerCallback:
    """Does nothing at every point; override what you need, and pass an instance in `Trainer(..., callbacks=[...])`.

    Every process calls the callbacks, in the order of the list, at the same steps. Within a call,
    `trainer.add_metrics({...})` puts numbers beside those that are logged next, and `trainer.stop(reason)` ends the
    run after the present step (with several processes after the next) as if it had been the last: values, validation
    images, a checkpoint, the pipeline and the card are written. An exception ends the run where it is.
    """

    def on_step_end(self, trainer: Any, step: int, values: Mapping[str, torch.Tensor] | None) -> None:
        """After every optimiser step.

        Args:
            trainer (`Trainer`): the run; read its `modules`, `ema`, `config`, `output_dir`.
            step (`int`): optimiser steps made.
            values (`Mapping[str, torch.Tensor]`, *optional*): raw losses of this process's share and the gradient's
                norm, on the device; None for a step that was skipped.
        """

    def on_checkpoint(self, trainer: Any, step: int, folder: Path) -> None:
        """After `checkpoint-<step>` has been written; `folder` is whole and may be copied, not changed."""

    def on_validation(self, trainer: Any, step: int, images: list[Image.Image]) -> None:
        """After the validation images of `step` were sampled; `images` is empty on all but the main process, and
        there too if a signal has interrupted the sampling."""

    def on_train_end(self, trainer: Any, step: int) -> None:
        """After the finished pipeline was written; not called for a run that was interrupted or failed."""
