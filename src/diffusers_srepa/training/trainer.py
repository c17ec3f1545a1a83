"""The training loop: setup, steps, and what is due after a step."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from diffusers_srepa.configuration.training import RunConfig
from diffusers_srepa.data.batches import training_batches
from diffusers_srepa.errors import ConfigurationError, in_options
from diffusers_srepa.files import FolderLock, remove_incomplete, write_text
from diffusers_srepa.training import checkpoint
from diffusers_srepa.training.callbacks import TrainerCallback
from diffusers_srepa.training.checkpoint import RunState
from diffusers_srepa.training.dataset import DATA_OPTIONS, load_dataset
from diffusers_srepa.training.distributed import (
    build_accelerator,
    micro_batch_size,
    prepare_sharding,
    resolve_precision,
    weightless_copy,
)
from diffusers_srepa.training.export import RunWriter, claim_repository
from diffusers_srepa.training.logging import Progress, resolve_trackers
from diffusers_srepa.training.method import TrainingMethod, check_method, saved_parts
from diffusers_srepa.training.methods.registry import METHODS
from diffusers_srepa.training.nonfinite import NonFiniteGuard
from diffusers_srepa.training.resume import Resumed, check_same_run, find_resume
from diffusers_srepa.training.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    check_output_folder,
    checkpoint_folders,
    clear_output_folder,
    set_aside_later,
    truncate_metrics,
    writing_to,
)
from diffusers_srepa.training.signals import Stop, StopRequest, TrainingInterrupted, outlive_signals
from diffusers_srepa.training.step import TrainingStep


logger = get_logger(__name__)


class Trainer:
    """A training run: `Trainer(config).train()`, or with objects in the place of what the configuration names.

    Args:
        config (`RunConfig`): resolved, as `parse_training_config` returns it; it is copied.
        method (`TrainingMethod`, *optional*): what is trained; by default the one that `config.method` names. Build
            it after seeding, so that every process starts from the same weights.
        transformer (`nn.Module`, *optional*): for the named method, its transformer; see `models/presets.py` for
            what it must have.
        dataset (*optional*): a `datasets.Dataset` or `IterableDataset` with images, or a dataset of training items;
            by default the one that `config.data` names.
        callbacks (`Sequence[TrainerCallback]`): called at the points of the run that `TrainerCallback` lists.

    Raises:
        ConfigurationError, DataError: whatever cannot work, before the first step; each names the option to change.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        method: TrainingMethod | None = None,
        transformer: nn.Module | None = None,
        dataset: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        config = copy.deepcopy(config)
        precision: Any = resolve_precision(config.training.mixed_precision)
        config.training.mixed_precision = precision
        # What is written down is what was used.
        if dataset is not None:
            config.data.dataset = "(in memory)"
        if method is not None:
            config.method = type(method).__name__
        config.validate()
        check_output_folder(config)
        self.config = config
        self.callbacks = tuple(callbacks)
        self.output_dir = Path(str(config.output_dir))
        self.accelerator = build_accelerator(config, resolve_trackers(config.tracking.report_to))
        with in_options(DATA_OPTIONS):
            self.micro_batch_size = micro_batch_size(config.training, self.accelerator.num_processes)
        self.lock = FolderLock(self.output_dir, "run")
        self.stop_request = StopRequest(self.accelerator)
        self.guard = NonFiniteGuard(config.training.max_skipped_steps)
        self.step = 0
        self.replaced_images = 0
        self._metrics: dict[str, float] = {}
        self._loss_weights: dict[str, float] = {}
        # Step of the newest checkpoint, until a finite loss has shown that its weights are good.
        self._unproven_checkpoint: int | None = None
        self._save_is_due = False
        try:
            self._set_up(method, transformer, dataset)
        except BaseException:
            self.lock.release()
            raise

    # ---------------------------------------------------------------- setup

    def _set_up(self, method: TrainingMethod | None, transformer: nn.Module | None, dataset: Any) -> None:
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            # Before the checkpoint is chosen, which a run that goes on here may still be adding to.
            with writing_to(self.output_dir), in_options({"output_dir": "--output_dir"}):
                self.lock.acquire()
        accelerator.wait_for_everyone()
        resumed = find_resume(config, accelerator)
        self.repository = claim_repository(config, accelerator)
        # Every rank initialises the same weights; nothing after this draws from the global generators.
        set_seed(config.seed)
        if method is None:
            method = METHODS[config.method].load()(config, transformer=transformer)
        elif transformer is not None:
            raise ConfigurationError("method and transformer are both given: give the method its transformer.")
        self.method = method
        self.dataset = load_dataset(config, method, accelerator, dataset)
        if resumed is not None:
            with in_options(DATA_OPTIONS):
                check_same_run(resumed, config, self.dataset, accelerator.num_processes)
        method.prepare(self.dataset)
        self.modules = method.modules
        check_method(method)
        self._prepare_training(resumed)
        self._prepare_folder()

    def _prepare_training(self, resumed: Resumed | None) -> None:
        config, accelerator, method = self.config, self.accelerator, self.method
        if resumed is not None:
            checkpoint.load_raw_weights(resumed.folder, self.modules)
        sharded = prepare_sharding(accelerator)
        templates = {name: weightless_copy(module) for name, module in self.modules.items()} if sharded else None
        share = config.training.global_batch_size // accelerator.num_processes
        self.training = TrainingStep(
            method,
            accelerator,
            options=config.optimizer,
            max_steps=config.training.max_steps,
            ema_decay=config.training.ema_decay,
            num_micro_batches=share // self.micro_batch_size,
            sharded=sharded,
        )
        self.ema = self.training.ema
        method.to(accelerator.device)
        self.writer = RunWriter(accelerator, config, method, self.training, templates, self.dataset.id2label)
        if resumed is not None:
            self._restore(resumed)

    def _restore(self, resumed: Resumed) -> None:
        state = resumed.state
        checkpoint.load_training_state(resumed.folder, self.modules, self.ema, self.training.plain_optimizers())
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.step = state.step
        self.guard.restore(state.step, state.skipped_steps)
        # The saved number counts all processes, as the sum over processes does.
        self.replaced_images = state.replaced_images if self.accelerator.is_main_process else 0
        logger.info(f"resumed from {resumed.folder} at step {self.step}")

    def _prepare_folder(self) -> None:
        config = self.config
        if self.accelerator.is_main_process:
            with writing_to(self.output_dir):
                if config.overwrite_output_dir and not config.resume_from_checkpoint:
                    clear_output_folder(self.output_dir, saved_parts(self.modules))
                write_text(self.output_dir / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))
                remove_incomplete(self.output_dir)
                set_aside_later(self.output_dir, self.step)
                truncate_metrics(self.output_dir / METRICS_FILE, self.step)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------- for callbacks

    def stop(self, reason: str) -> None:
        """End the run after the present step, with several processes after the next, as if that were its last.

        Values are logged, images sampled where `validation.every` is not 0, checkpoint, pipeline and card written.
        """
        self.stop_request.finish(reason)

    def add_metrics(self, values: Mapping[str, float]) -> None:
        """Log numbers of your own with the values that are logged next; of several under one name the last counts."""
        self._metrics |= {name: float(value) for name, value in values.items()}

    # ----------------------------------------------------------------- loop

    def train(self) -> Path:
        """Train to `training.max_steps` and write the finished pipeline.

        Returns:
            `Path`: the output folder, loadable by `SiTPipeline.from_pretrained`.

        Raises:
            TrainingInterrupted: a signal asked to stop; everything up to the last whole step is saved.
            FloatingPointError: too many steps in a row without a finite loss; nothing good is lost.
            CheckpointError: a checkpoint, or what else is due, could not be written.
            DataError: the data cannot be read on.
        """
        self.progress = Progress(self.accelerator, self.config, self.step)
        self.progress.announce(self.method.describe() or [type(self.method).__name__])
        self.training.train_mode()
        try:
            with self.stop_request:
                if self.step < self.config.training.max_steps:
                    self._loop()
                # Every growth of the scale of fp16 may cost one step, so one says nothing about the weights.
                let_pass = int(self.accelerator.scaler is not None)
                self.guard.check(self.step, self.output_dir, let_pass)
                with writing_to(self.output_dir):
                    self.writer.finish(self.step, self.repository)
                for callback in self.callbacks:
                    callback.on_train_end(self, self.step)
            self._end()
        except TrainingInterrupted:
            self._end()
            raise
        finally:
            self.lock.release()
        return self.output_dir

    def _end(self) -> None:
        self.accelerator.wait_for_everyone()
        self.training.unwrap()
        self.accelerator.free_memory()
        self.progress.close()

    def _batches(self) -> Generator[dict[str, torch.Tensor], None, None]:
        """This process's micro-batches from the present step on, on the device."""
        batches = training_batches(
            self.dataset,
            global_batch_size=self.config.training.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=self.config.seed,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            start_step=self.step,
            num_steps=self.config.training.max_steps,
            num_workers=self.config.data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=outlive_signals,
        )
        with closing(batches), in_options(DATA_OPTIONS):
            for batch in batches:
                self.replaced_images += int(batch["replaced"].sum()) if "replaced" in batch else 0
                # Positions stay on the CPU, where the random numbers are drawn.
                yield {
                    name: value
                    if name in ("position", "replaced")
                    else value.to(self.accelerator.device, non_blocking=True)
                    for name, value in batch.items()
                }

    def _loop(self) -> None:
        with closing(self._batches()) as batches, logging_redirect_tqdm():
            while self.step < self.config.training.max_steps:
                self.training.rewrap(self.method.release(self.step))
                values, self._loss_weights = self.training.run(batches, self.step)
                self.guard.note(self.step, values is not None)
                self.step += 1
                self.progress.advance()
                self._after_step(values)
                stop = self.stop_request.agreed()
                if stop is not Stop.NOT and self.step < self.config.training.max_steps:
                    self._stop(stop, is_finite=values is not None)
                    return

    def _after_step(self, values: dict[str, torch.Tensor] | None) -> None:
        """Log, save and validate where that is due; weights that have just given no finite loss are not saved."""
        config = self.config
        if values is not None:
            self.progress.meter.add(values)
        for callback in self.callbacks:
            callback.on_step_end(self, self.step, values)
        if self.step % config.training.log_every == 0 or self.step == config.training.max_steps:
            self._log()
        self.guard.check(self.step, self.output_dir)
        started = time.perf_counter()
        if values is not None and self._unproven_checkpoint is not None:
            # Its weights have given a finite loss now: older checkpoints may go.
            with writing_to(self.output_dir):
                self.writer.prune_checkpoints()
            self._unproven_checkpoint = None
        self._save_is_due = self._save_is_due or self._is_due(config.checkpoints.every)
        if self._save_is_due and values is not None:
            self._save_checkpoint()
        if self._is_due(config.validation.every):
            self._validate()
        self.progress.meter.exclude(time.perf_counter() - started)

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.training.max_steps)

    def _log(self) -> None:
        more = self.training.current_learning_rate(self.step)
        more |= {f"weight/{name}": weight for name, weight in self._loss_weights.items()}
        more |= {"replaced_images": float(self._count_replaced()), "skipped_steps": float(self.guard.skipped_steps)}
        with writing_to(self.output_dir):
            self.progress.log_values(self.step, {**more, **self._metrics})
        self._metrics = {}

    def _count_replaced(self) -> int:
        """Unreadable images that all processes have replaced; every process must call."""
        total = torch.tensor(self.replaced_images, device=self.accelerator.device)
        return int(self.accelerator.reduce(total, reduction="sum"))

    def _validate(self) -> None:
        with writing_to(self.output_dir):
            images, grid = self.writer.validate(self.step, self.stop_request.requested)
        if grid is not None:
            self.progress.log.log_image("validation", grid, self.step)
        for callback in self.callbacks:
            callback.on_validation(self, self.step, images)

    def _save_checkpoint(self) -> None:
        scaler = self.accelerator.scaler
        state = RunState(
            step=self.step,
            seed=self.config.seed,
            global_batch_size=self.config.training.global_batch_size,
            num_processes=self.accelerator.num_processes,
            dataset_fingerprint=self.dataset.fingerprint,
            replaced_images=self._count_replaced(),
            skipped_steps=self.guard.skipped_steps,
            scaler=scaler.state_dict() if scaler is not None else {},
        )
        folder = self.writer.save_checkpoint(state)
        self._save_is_due, self._unproven_checkpoint = False, self.step
        for callback in self.callbacks:
            callback.on_checkpoint(self, self.step, folder)

    def _stop(self, stop: Stop, is_finite: bool) -> None:
        if stop is Stop.FINISH:
            # What the last step of a run has besides.
            if self.step % self.config.training.log_every:
                self._log()
            if self.config.validation.every and not self._is_due(self.config.validation.every):
                self._validate()
        if is_finite and self._unproven_checkpoint != self.step:
            self._save_checkpoint()
        if stop is Stop.FINISH:
            reason = self.stop_request.finish_reason or "another process"
            logger.info(f"training ends after step {self.step}: {reason}")
            return
        saved = checkpoint_folders(self.output_dir)
        where = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        reason = self.stop_request.reason or "a signal to another process"
        raise TrainingInterrupted(
            f"stopped by {reason} after step {self.step}; {where}: go on with --resume_from_checkpoint latest."
        )
