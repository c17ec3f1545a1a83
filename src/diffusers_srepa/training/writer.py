"""What a run leaves in its folder: checkpoints, validation grids, the finished pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.training import export, publish, validation
from diffusers_srepa.training.checkpoint_folder import prune_checkpoints
from diffusers_srepa.training.checkpoints import RunState, save_checkpoint
from diffusers_srepa.training.components import Components
from diffusers_srepa.training.ema import WeightAverage
from diffusers_srepa.training.sharding import gather
from diffusers_srepa.training.snapshot import rebuild, take_snapshot


logger = get_logger(__name__)


class RunWriter:
    """Writes on the main process; its methods that gather weights must be called by every process.

    Args:
        accelerator (`Accelerator`): the run's.
        config (`TrainingConfig`): its configuration.
        parts (`Components`): its parts, the student still without wrapper.
        student (`AlignedDenoiser`): the unwrapped trained module, sharded or not.
        average (`WeightAverage`): its moving average.
        template (`AlignedDenoiser`, *optional*): copy without memory of a sharded student.
        repository (`str`, *optional*): where the finished pipeline is pushed.

    Raises:
        ConfigurationError: validation settings with which the pipeline could not sample.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainingConfig,
        parts: Components,
        student: AlignedDenoiser,
        average: WeightAverage,
        template: AlignedDenoiser | None,
        repository: str | None,
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.parts = parts
        self.student = student
        self.average = average
        self.template = template
        self.repository = repository
        self.output_dir = Path(str(config.output_dir))
        self.pipeline = export.build_pipeline(parts.transformer, parts.codec, parts.id2label, config)
        self.labels = validation.validation_labels(config.validation, parts.transformer.config.num_classes)
        # What could not be sampled is found now, not at the first grid.
        validation.check_sampling(self.pipeline, config.sampling)
        validation.check_labels(self.pipeline, self.labels)

    @contextmanager
    def averaged_student(self) -> Iterator[AlignedDenoiser]:
        """The whole student with the averaged weights; only the main process may use it."""
        if self.template is None:
            with self.average.applied():
                self.student.eval()
                yield self.student
            self.student.train()
            return
        main = self.accelerator.is_main_process
        weights = gather({**self.student.state_dict(), **self.average.state()}, keep=main)
        yield rebuild(self.template, weights) if main else self.student

    def save_checkpoint(self, state: RunState, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: it could not be written; the earlier ones are untouched.
        """
        main = self.accelerator.is_main_process
        snapshot = take_snapshot(self.student, self.average, optimizer, self.template, keep=main)
        if snapshot is not None:
            config_text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
            folder = save_checkpoint(self.output_dir, state, snapshot, config_text)
            logger.info(f"saved {folder}")
        self.accelerator.wait_for_everyone()

    def prune_checkpoints(self) -> None:
        """Delete the checkpoints beyond `checkpoints.total_limit`."""
        if self.accelerator.is_main_process:
            prune_checkpoints(self.output_dir, self.config.checkpoints.total_limit)

    def validate(self, step: int, is_given_up: Callable[[], bool]) -> Image.Image | None:
        """Sample the validation images; returns their grid on the main process, None if it was given up meanwhile."""
        grid = None
        with self.averaged_student() as student:
            if self.accelerator.is_main_process:
                self._sample_with(student)
                settings = (self.config.validation, self.config.sampling)
                images = validation.sample_images(self.pipeline, self.labels, *settings, is_given_up)
                folder = self.output_dir / "validation" / f"step-{step}"
                if len(images) == len(self.labels):
                    grid = validation.write_validation(folder, self.pipeline, images, self.labels, *settings)
        self.accelerator.wait_for_everyone()
        return grid

    def finish(self, step: int) -> None:
        """Write the finished pipeline and its card, and push them if a repository is given."""
        with self.averaged_student() as student:
            if self.accelerator.is_main_process:
                self._sample_with(student)
                export.save_finished(self.pipeline, student, self.output_dir)
                publish.write_card(self.config, self.parts, self.output_dir, step, self.repository)
                logger.info(f"the finished pipeline is in {self.output_dir}")
                if self.repository is not None:
                    publish.push(self.output_dir, self.repository, step)
        self.accelerator.wait_for_everyone()

    def _sample_with(self, student: AlignedDenoiser) -> None:
        if self.template is not None:
            student.to(self.accelerator.device)
            self.pipeline.register_modules(transformer=student.transformer)
