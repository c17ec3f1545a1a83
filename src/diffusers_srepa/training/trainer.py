"""The training loop: setup, step, and what is due after a step."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm.contrib.logging import logging_redirect_tqdm

from diffusers_srepa.data.batches import training_batches
from diffusers_srepa.errors import in_options
from diffusers_srepa.interpolant import get_interpolant
from diffusers_srepa.training import checkpoint_folder, checkpoints, publish
from diffusers_srepa.training.accelerator import build_accelerator
from diffusers_srepa.training.checkpoints import RunState
from diffusers_srepa.training.components import DATA_OPTIONS, build_components
from diffusers_srepa.training.config import TrainingConfig
from diffusers_srepa.training.ema import WeightAverage
from diffusers_srepa.training.finite import FiniteGuard, poison_unless_finite
from diffusers_srepa.training.interruption import StopRequest, TrainingInterrupted, outlive_signals
from diffusers_srepa.training.launch import check_environment, check_processes, micro_batch_size
from diffusers_srepa.training.method import AlignedFlowMatching
from diffusers_srepa.training.optimization import build_lr_schedule, build_optimizer, set_schedule_step
from diffusers_srepa.training.reports import Reports
from diffusers_srepa.training.resume import find_resume
from diffusers_srepa.training.run_folder import (
    METRICS_FILE,
    check_output_folder,
    checkpoint_folders,
    clear_output_folder,
    truncate_metrics,
    write_config,
)
from diffusers_srepa.training.run_lock import RunLock
from diffusers_srepa.training.sharding import prepare_sharding, weightless_copy
from diffusers_srepa.training.writer import RunWriter


logger = get_logger(__name__)


class Trainer:
    """A training run from its configuration: `Trainer(config).train()`.

    Args:
        config (`TrainingConfig`): resolved and validated, as `parse_training_config` returns it.

    Raises:
        ConfigurationError, DataError: whatever cannot work, before the first step; each names the option to change.
    """

    def __init__(self, config: TrainingConfig) -> None:
        config.validate()
        check_environment()
        check_output_folder(config)
        self.config = config
        self.output_dir = Path(str(config.output_dir))
        self.accelerator = build_accelerator(config)
        check_processes(self.accelerator, config.expected_processes)
        self.stop = StopRequest(self.accelerator)
        self.micro_batch_size = micro_batch_size(config.training, self.accelerator.num_processes)
        self.repository = publish.claim_repository(config, self.accelerator)
        # Every rank initialises the same weights; nothing after this draws from the global generators.
        set_seed(config.seed)
        self.parts = build_components(config, self.accelerator)
        self.guard = FiniteGuard(config.training.max_skipped_steps)
        self.step = 0
        self.replaced_images = 0
        self._unproven_step: int | None = None
        self._save_is_due = False
        self._prepare_training()
        self._prepare_folder()

    # ---------------------------------------------------------------- setup

    def _prepare_training(self) -> None:
        config, parts, device = self.config, self.parts, self.accelerator.device
        resumed = find_resume(config, parts.dataset, self.accelerator.num_processes)
        if resumed is not None:
            checkpoints.load_trained_weights(resumed.folder, parts.student)
        sharded = prepare_sharding(self.accelerator, list(parts.transformer._no_split_modules or []))
        template = weightless_copy(parts.student) if sharded else None
        if config.model.compile:
            parts.transformer.compile_repeated_blocks()
        optimizer = build_optimizer(parts.student.to(device).parameters(), config.optimizer)
        self.student, self.optimizer = self.accelerator.prepare(parts.student, optimizer)
        self.unwrapped = self.accelerator.unwrap_model(self.student)
        self.lr_schedule = build_lr_schedule(self.optimizer.optimizer, config.optimizer, config.training.max_steps)
        self.average = WeightAverage(self.unwrapped, config.training.ema_decay)
        self.writer = RunWriter(
            self.accelerator, config, parts, self.unwrapped, self.average, template, self.repository
        )
        parts.codec.to(device)
        for teacher in parts.teachers.values():
            teacher.to(device)
        self.method = self._build_method()
        if resumed is not None:
            self._restore(resumed.folder, resumed.state)

    def _build_method(self) -> AlignedFlowMatching:
        config, parts = self.config, self.parts
        return AlignedFlowMatching(
            self.student,
            parts.codec,
            parts.teachers,
            parts.criterion,
            get_interpolant(config.flow.path),
            config.flow,
            seed=config.seed,
            class_dropout_prob=parts.transformer.config.class_dropout_prob,
            timestep_scale=parts.transformer.config.timestep_scale,
            class_token_weight=config.alignment.class_token_weight,
            autocast=self.accelerator.autocast,
        )

    def _restore(self, folder: Path, state: RunState) -> None:
        checkpoints.load_training_state(folder, self.unwrapped, self.average, self.optimizer.optimizer)
        set_schedule_step(self.lr_schedule, state.step)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.step = state.step
        self.guard.restore(state.step, state.skipped_steps)
        # The saved number counts all processes, as the sum over processes does.
        self.replaced_images = state.replaced_images if self.accelerator.is_main_process else 0
        logger.info(f"resumed from {folder} at step {self.step}")

    def _prepare_folder(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        self.lock = RunLock(self.output_dir)
        if main:
            with checkpoints.writing_to(self.output_dir):
                self.lock.acquire()
                if config.overwrite_output_dir and not config.resume_from_checkpoint:
                    clear_output_folder(self.output_dir)
                write_config(config, self.output_dir)
                checkpoint_folder.remove_incomplete(self.output_dir)
                checkpoint_folder.set_aside_later(self.output_dir, self.step)
                truncate_metrics(self.output_dir / METRICS_FILE, self.step)
        self.accelerator.wait_for_everyone()

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
        self.reports = Reports(self.accelerator, self.config, self.parts, self.step)
        self.reports.announce()
        self.student.train()
        try:
            with checkpoints.writing_to(self.output_dir), self.stop:
                if self.step < self.config.training.max_steps:
                    self._loop()
                self.guard.check_end(self.step, self.output_dir, self.accelerator.scaler is not None)
                self.writer.finish(self.step)
            self._end()
        except TrainingInterrupted:
            self._end()
            raise
        finally:
            self.lock.release()
        return self.output_dir

    def _end(self) -> None:
        # With gloo, a DDP module that is alive when the process group goes can wait for ever for a peer that has left.
        self.accelerator.wait_for_everyone()
        self.student = self.method.student = self.unwrapped
        self.accelerator.free_memory()
        self.reports.close()

    def _batches(self) -> Generator[dict[str, torch.Tensor], None, None]:
        return training_batches(
            self.parts.dataset,
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

    def _loop(self) -> None:
        with closing(self._batches()) as batches, logging_redirect_tqdm():
            while self.step < self.config.training.max_steps:
                self._drop_ended_terms()
                values = self._train_step(batches)
                self.step += 1
                self.reports.advance()
                self._after_step(values)
                if self.stop.agreed() and self.step < self.config.training.max_steps:
                    self._stop(is_finite=values is not None)

    def _after_step(self, values: dict[str, torch.Tensor] | None) -> None:
        """Log, save and validate where that is due; weights that have just given no finite loss are not saved."""
        config = self.config
        if values is not None:
            self.reports.meter.add(values)
        if self.step % config.training.log_every == 0 or self.step == config.training.max_steps:
            self.reports.log_values(
                self.step,
                float(self.lr_schedule.get_last_lr()[0]),
                self.reports.count(self.replaced_images),
                self.guard.skipped_steps,
            )
        self.guard.check(self.step, self.output_dir)
        started = time.perf_counter()
        if values is not None and self._unproven_step is not None:
            # The newest checkpoint has given a finite loss now: older ones may go.
            self.writer.prune_checkpoints()
            self._unproven_step = None
        self._save_is_due = self._save_is_due or self._is_due(config.checkpoints.every)
        if self._save_is_due and values is not None:
            self._save_checkpoint()
        if self._is_due(config.validation.every):
            grid = self.writer.validate(self.step, self.stop.requested)
            if grid is not None:
                self.reports.log.log_image("validation", grid, self.step)
        self.reports.meter.exclude(time.perf_counter() - started)

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.training.max_steps)

    def _save_checkpoint(self) -> None:
        scaler = self.accelerator.scaler
        state = RunState(
            step=self.step,
            seed=self.config.seed,
            global_batch_size=self.config.training.global_batch_size,
            num_processes=self.accelerator.num_processes,
            dataset_fingerprint=self.parts.dataset.fingerprint,
            replaced_images=self.reports.count(self.replaced_images),
            skipped_steps=self.guard.skipped_steps,
            scaler=scaler.state_dict() if scaler is not None else {},
        )
        self.writer.save_checkpoint(state, self.optimizer.optimizer)
        self._save_is_due, self._unproven_step = False, self.step

    def _stop(self, is_finite: bool) -> None:
        if is_finite and self._unproven_step != self.step:
            self._save_checkpoint()
        saved = checkpoint_folders(self.output_dir)
        where = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        reason = self.stop.reason or "a signal to another process"
        raise TrainingInterrupted(
            f"stopped by {reason} after step {self.step}; {where}: go on with --resume_from_checkpoint latest."
        )

    def _drop_ended_terms(self) -> None:
        """Let go of what only terms that have ended for good needed: tap, projector and teacher.

        Stopped projectors keep their weights but get no gradient, for which DDP would wait for ever: it is wrapped
        anew around what still trains. FSDP reduces the gradients that are there and needs nothing.
        """
        criterion = self.parts.criterion
        ended = set(self.unwrapped.features) - set(criterion.features(self.step))
        if not ended:
            return
        self.unwrapped.stop_features(ended)
        if isinstance(self.student, DistributedDataParallel):
            self.accelerator._models.clear()
            self.student = self.method.student = self.accelerator.prepare_model(self.unwrapped)
        needed = self.method.needed_teachers(self.step)
        self.parts.teachers = {name: teacher for name, teacher in self.parts.teachers.items() if name in needed}
        self.method.teachers = dict(self.parts.teachers)
        logger.info(f"step {self.step}: {len(ended)} aligned feature(s) have ended and are dropped")

    def _train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
        """One optimiser step.

        Returns:
            `dict[str, torch.Tensor]`: means of the raw values over this process's micro-batches, and the gradient's
            norm before clipping; None if the step was skipped.
        """
        share = self.config.training.global_batch_size // self.accelerator.num_processes
        num_micro_batches = share // self.micro_batch_size
        sums: dict[str, torch.Tensor] = {}
        for index in range(num_micro_batches):
            with in_options(DATA_OPTIONS):
                batch = next(batches)
            batch = self._to_device(batch)
            with self._gradients_travel(index == num_micro_batches - 1):
                output = self.method(batch, self.step)
                self.accelerator.backward(poison_unless_finite(output.loss) / num_micro_batches)
            for name, value in {"loss": output.loss.detach(), **output.parts}.items():
                sums[name] = sums.get(name, 0.0) + value / num_micro_batches
        norm = self._optimizer_step()
        is_finite = bool(torch.isfinite(norm))
        self.guard.note(self.step, is_finite)
        return {**sums, "grad_norm": norm} if is_finite else None

    def _gradients_travel(self, last: bool) -> AbstractContextManager[Any]:
        # Between processes once per optimiser step, with the last micro-batch.
        return nullcontext() if last else self.accelerator.no_sync(self.student)

    def _optimizer_step(self) -> torch.Tensor:
        """Update weights and average unless the gradient is not finite; returns its norm before clipping."""
        limit = self.config.optimizer.max_grad_norm or float("inf")
        norm: Any = self.accelerator.clip_grad_norm_(self.student.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_finite = bool(torch.isfinite(norm))
        # The scaler of fp16 skips by itself, and has to know of it to lower its scale.
        if is_finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        if is_finite:
            self.average.update()
        set_schedule_step(self.lr_schedule, self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.replaced_images += int(batch["replaced"].sum())
        # Positions stay on the CPU, where the random numbers are drawn.
        device = self.accelerator.device
        moved = ("pixel_values", "moments", "class_labels")
        return {name: value.to(device, non_blocking=True) if name in moved else value for name, value in batch.items()}
