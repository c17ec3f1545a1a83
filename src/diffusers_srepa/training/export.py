"""What a run leaves in its folder: checkpoints, validation images, the finished pipeline with its card."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import nn

from diffusers_srepa.configuration.training import RunConfig
from diffusers_srepa.errors import in_options
from diffusers_srepa.files import TEMPORARY_PREFIX, flush
from diffusers_srepa.publishing import hub
from diffusers_srepa.sampling.images import SamplingSettings, check_sampling, sample_images, write_images
from diffusers_srepa.training.card_facts import write_card
from diffusers_srepa.training.checkpoint import RunState, optimizer_state, save_checkpoint, save_parts
from diffusers_srepa.training.distributed import gather
from diffusers_srepa.training.method import TrainingMethod, saved_parts
from diffusers_srepa.training.run_folder import prune_checkpoints, writing_to
from diffusers_srepa.training.step import TrainingStep


logger = get_logger(__name__)


class RunWriter:
    """Writes on the main process; its methods that gather weights must be called by every process.

    Args:
        accelerator (`Accelerator`): the run's.
        config (`RunConfig`): its configuration.
        method (`TrainingMethod`): what is trained, prepared.
        training (`TrainingStep`): modules, optimisers and average.
        templates (`Mapping[str, nn.Module]`, *optional*): copies without memory of sharded modules by name.
        id2label (`Mapping[int, str]`, *optional*): class names, for the card.

    Raises:
        ConfigurationError: validation settings with which the pipeline could not sample.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: RunConfig,
        method: TrainingMethod,
        training: TrainingStep,
        templates: Mapping[str, nn.Module] | None,
        id2label: Mapping[int, str] | None,
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.method = method
        self.training = training
        self.templates = templates
        self.id2label = id2label
        self.output_dir = Path(str(config.output_dir))
        sampling, validation = config.sampling, config.validation
        self.settings = SamplingSettings(
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_interval=sampling.guidance_interval,
            seed=validation.seed,
            batch_size=validation.batch_size,
        )
        pipeline = method.build_pipeline(method.modules)
        num_classes = pipeline.transformer.config.num_classes
        # The configured classes, else the classes in turn.
        in_turn = [index % num_classes for index in range(validation.num_images)]
        self.labels = in_turn if validation.class_labels is None else list(validation.class_labels)
        # What could not be sampled is found now, not at the first grid.
        with in_options({"settings": "section sampling", "class_labels": "validation.class_labels"}):
            check_sampling(pipeline, self.labels, self.settings)

    @contextmanager
    def averaged_modules(self) -> Iterator[dict[str, nn.Module]]:
        """The whole modules with the averaged weights; only the main process may use them."""
        ema, modules = self.training.ema, self.method.modules
        if self.templates is None:
            was_training = [module for module in modules.values() if module.training]
            try:
                with ema.applied():
                    for module in modules.values():
                        module.eval()
                    yield dict(modules)
            finally:
                for module in was_training:
                    module.train()
            return
        main = self.accelerator.is_main_process
        whole = {}
        for name, module in modules.items():
            weights = gather({**module.state_dict(), **ema.of_module(name)}, keep=main)
            if main:
                whole[name] = copy.deepcopy(self.templates[name])
                whole[name].load_state_dict(weights, assign=True)
                whole[name].eval().to(self.accelerator.device)
        yield whole

    def save_checkpoint(self, state: RunState) -> Path:
        """Write a checkpoint.

        Raises:
            CheckpointError: it could not be written; the earlier ones are untouched.
        """
        main, modules = self.accelerator.is_main_process, self.method.modules
        states = {name: module.state_dict() for name, module in modules.items()}
        # These tensors stay the trained weights while parameters and averages change places below.
        raw = gather({f"{name}.{key}": value for name, saved in states.items() for key, value in saved.items()}, main)
        optimizers = {}
        for name, optimizer in self.training.plain_optimizers().items():
            tensors, groups = optimizer_state(optimizer, modules)
            optimizers[name] = (gather(tensors, keep=main), groups)
        with self.averaged_modules() as averaged:
            if main:
                folder = save_checkpoint(
                    self.output_dir,
                    state,
                    raw=raw,
                    averaged=averaged,
                    optimizers=optimizers,
                    pipeline=self.method.build_pipeline(averaged),
                    autoencoder=self.method.autoencoder_reference(),
                    config_text=yaml.safe_dump(self.config.to_dict(), sort_keys=False),
                )
                logger.info(f"saved {folder}")
        self.accelerator.wait_for_everyone()
        return self.output_dir / f"checkpoint-{state.step}"

    def prune_checkpoints(self) -> None:
        """Delete the checkpoints beyond `checkpoints.total_limit`."""
        if self.accelerator.is_main_process:
            prune_checkpoints(self.output_dir, self.config.checkpoints.total_limit)

    def validate(self, step: int, is_given_up: Callable[[], bool]) -> tuple[list[Image.Image], Image.Image | None]:
        """Sample the validation images; they and their grid on the main process, unless it was given up meanwhile."""
        images: list[Image.Image] = []
        grid = None
        with self.averaged_modules() as averaged:
            if self.accelerator.is_main_process:
                pipeline = self.method.build_pipeline(averaged)
                images = sample_images(pipeline, self.labels, self.settings, is_given_up)
                if len(images) == len(self.labels):
                    folder = self.output_dir / "validation" / f"step-{step}"
                    grid = write_images(folder, pipeline, images, self.labels, self.settings)
        self.accelerator.wait_for_everyone()
        return (images if grid is not None else []), grid

    def finish(self, step: int, repository: str | None) -> None:
        """Write the finished pipeline and its card, and push them if a repository is given."""
        with self.averaged_modules() as averaged:
            if self.accelerator.is_main_process:
                pipeline = self.method.build_pipeline(averaged)
                save_finished(pipeline, averaged, self.output_dir)
                write_card(
                    self.config,
                    self.method,
                    pipeline,
                    self.output_dir,
                    step,
                    self.id2label,
                    repository,
                    self.training.loss_names,
                )
                logger.info(f"the finished pipeline is in {self.output_dir}")
                if repository is not None:
                    push(self.output_dir, repository, step, list(saved_parts(averaged)))
        self.accelerator.wait_for_everyone()


def save_finished(pipeline: Any, modules: Mapping[str, nn.Module], output_dir: Path) -> None:
    """Write the pipeline, and beside it what else was trained, with the weights that they have now.

    Everything is written beside its place first and then moved, `model_index.json` last: a folder that has this file
    has a whole pipeline.

    Raises:
        CheckpointError: the disk is full or fails otherwise; the run can be resumed, and writes the pipeline then.
    """
    temporary = output_dir / f"{TEMPORARY_PREFIX}pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing_to(output_dir, "the finished pipeline"):
            pipeline.save_pretrained(temporary)
            save_parts(modules, temporary, without=tuple(pipeline.components))
            flush(temporary)
            # An earlier end of the run has left one; until the last part is in place there is no whole pipeline.
            (output_dir / "model_index.json").unlink(missing_ok=True)
            for part in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):
                if part.is_dir():
                    shutil.rmtree(output_dir / part.name, ignore_errors=True)
                os.replace(part, output_dir / part.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def claim_repository(config: RunConfig, accelerator: Accelerator) -> str | None:
    """The full id of the repository to push to, created before training; None if nothing is to be pushed.

    Raises:
        HubError: no token, no permission, an id that is not valid, or a Hub that cannot be reached.
    """
    if not config.push_to_hub:
        return None
    repository: list[str | None] = [None]
    if accelerator.is_main_process:
        name = config.hub_model_id or Path(str(config.output_dir)).resolve().name
        repository = [hub.create_repository(name, private=config.hub_private or None, license=config.hub_license)]
    return broadcast_object_list(repository)[0]


def push(output_dir: Path, repository: str, step: int, parts: Sequence[str]) -> None:
    """Upload the finished pipeline and the folders of its `parts`; a Hub that fails costs a warning, never the run."""
    message = f"Upload SiTPipeline after {step} steps"
    try:
        url = hub.push_folder(output_dir, repository, commit_message=message, parts=parts)
    except hub.HubError as error:
        logger.warning(f"the pipeline was not pushed: {error}")
        return
    logger.info(f"pushed to {url}")
