"""The training loop: setup, step, log, checkpoint, validation, the finished pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, set_seed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from diffusers_srepa.errors import ConfigurationError, DataError
from diffusers_srepa.interpolant import get_interpolant
from diffusers_srepa.training import checkpoints, export, publish, validation
from diffusers_srepa.training.batches import training_batches
from diffusers_srepa.training.checkpoints import RunState
from diffusers_srepa.training.compare import check_same_options
from diffusers_srepa.training.components import build_components
from diffusers_srepa.training.config import TrainingConfig
from diffusers_srepa.training.ema import WeightAverage, warn_if_average_is_young
from diffusers_srepa.training.launch import check_environment, check_processes, micro_batch_size
from diffusers_srepa.training.meter import Meter
from diffusers_srepa.training.method import AlignedFlowMatching
from diffusers_srepa.training.optimization import build_lr_schedule, build_optimizer, set_schedule_step
from diffusers_srepa.training.run_folder import (
    METRICS_FILE,
    check_output_folder,
    checkpoint_folders,
    clear_output_folder,
    truncate_metrics,
    write_config,
)
from diffusers_srepa.training.tracking import RunLog, resolve_trackers


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
        self.accelerator = self._build_accelerator()
        check_processes(self.accelerator, config.expected_processes)
        self.micro_batch_size = micro_batch_size(config.training, self.accelerator.num_processes)
        self.repository = publish.claim_repository(config, self.accelerator)
        # Every rank initialises the same weights; nothing after this draws from the global generators.
        set_seed(config.seed)
        self.parts = build_components(config, self.accelerator)
        self.step = 0
        self.replaced_images = 0
        self._prepare_training()
        self._prepare_validation()
        self._prepare_folder()

    # ---------------------------------------------------------------- setup

    def _build_accelerator(self) -> Accelerator:
        config = self.config
        folders = ProjectConfiguration(project_dir=str(self.output_dir), logging_dir=str(self.output_dir / "logs"))
        # Accelerate keeps the precision of the first run in a process for all later ones.
        shared = AcceleratorState._shared_state
        if shared and shared.get("_mixed_precision") != config.training.mixed_precision:
            AcceleratorState._reset_state()
        accelerator = Accelerator(
            mixed_precision=config.training.mixed_precision,
            log_with=resolve_trackers(config.tracking.report_to),
            project_config=folders,
        )
        if accelerator.device.type == "cpu" and config.training.mixed_precision == "fp16":
            raise ConfigurationError(
                "training.mixed_precision is fp16, which needs an accelerator: set it to bf16 or no on the CPU."
            )
        if accelerator.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
            torch.backends.cudnn.allow_tf32 = config.training.allow_tf32
        return accelerator

    def _prepare_training(self) -> None:
        config, parts, device = self.config, self.parts, self.accelerator.device
        if config.model.compile:
            parts.transformer.compile_repeated_blocks()
        optimizer = build_optimizer(parts.student.to(device).parameters(), config.optimizer)
        self.student, self.optimizer = self.accelerator.prepare(parts.student, optimizer)
        self.unwrapped = self.accelerator.unwrap_model(self.student)
        self.lr_schedule = build_lr_schedule(self.optimizer.optimizer, config.optimizer, config.training.max_steps)
        self.average = WeightAverage(self.unwrapped, config.training.ema_decay)
        parts.codec.to(device)
        for teacher in parts.teachers.values():
            teacher.to(device)
        self.method = AlignedFlowMatching(
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

    def _prepare_validation(self) -> None:
        parts, transformer = self.parts, self.parts.transformer
        self.pipeline = export.build_pipeline(transformer, parts.codec, parts.id2label, self.config)
        self.validation_labels = validation.validation_labels(self.config.validation, transformer.config.num_classes)
        # What could not be sampled is found now, not at the first grid.
        validation.check_sampling(self.pipeline, self.config.sampling)
        validation.check_labels(self.pipeline, self.validation_labels)

    def _prepare_folder(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        if main and config.overwrite_output_dir and not config.resume_from_checkpoint:
            clear_output_folder(self.output_dir)
        if config.resume_from_checkpoint:
            self._resume(config.resume_from_checkpoint)
        if main:
            write_config(config, self.output_dir)
            checkpoints.remove_incomplete(self.output_dir)
            checkpoints.set_aside_later(self.output_dir, self.step)
            truncate_metrics(self.output_dir / METRICS_FILE, self.step)
        self.accelerator.wait_for_everyone()
        self.log = RunLog(self.accelerator, config)

    def _resume(self, wanted: str) -> None:
        folder = checkpoints.find_checkpoint(self.output_dir, wanted)
        if folder is None:
            logger.warning(f"there is no checkpoint in {self.output_dir} yet: the run starts from the beginning.")
            return
        check_same_options(folder, self.config)
        state = checkpoints.load_checkpoint(folder, self.unwrapped, self.average, self.optimizer.optimizer)
        self._check_same_run(folder, state)
        if state.step > self.config.training.max_steps:
            raise ConfigurationError(
                f"the checkpoint {folder} is at step {state.step}, but training.max_steps is "
                f"{self.config.training.max_steps}: raise it, or resume from an earlier checkpoint."
            )
        set_schedule_step(self.lr_schedule, state.step)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.step = state.step
        # The saved number counts all processes, as the sum over processes does.
        self.replaced_images = state.replaced_images if self.accelerator.is_main_process else 0
        logger.info(f"resumed from {folder} at step {self.step}")

    def _check_same_run(self, folder: Path, state: RunState) -> None:
        compared = {
            "seed": (state.seed, self.config.seed),
            "training.global_batch_size": (state.global_batch_size, self.config.training.global_batch_size),
            "the dataset's fingerprint": (state.dataset_fingerprint, self.parts.dataset.fingerprint),
        }
        for name, (before, now) in compared.items():
            if before != now:
                raise ConfigurationError(
                    f"the checkpoint {folder} cannot be continued exactly: {name} was {before} and is {now} now."
                )

    # ----------------------------------------------------------------- loop

    def train(self) -> Path:
        """Train to `training.max_steps` and write the finished pipeline.

        Returns:
            `Path`: the output folder, loadable by `SiTPipeline.from_pretrained`.
        """
        config = self.config
        self._announce()
        self.student.train()
        if self.step < config.training.max_steps:
            self._loop(self._batches())
        with self.average.applied():
            self._finish()
        self._end()
        return self.output_dir

    def _end(self) -> None:
        # With gloo, a DDP module that is alive when the process group goes can wait for ever for a peer that has left.
        self.accelerator.wait_for_everyone()
        self.student = self.method.student = self.unwrapped
        self.accelerator.free_memory()
        self.log.close()

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
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
        )

    def _loop(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        config, last_step = self.config, self.config.training.max_steps
        meter = Meter(config.training.global_batch_size)
        with self._progress_bar() as progress, logging_redirect_tqdm():
            while self.step < last_step:
                self._drop_ended_terms()
                values = self._train_step(batches)
                meter.add(values)
                self.step += 1
                progress.update()
                if self.step % config.training.log_every == 0 or self.step == last_step:
                    self._log(meter, progress)
                self._check_finite(values)
                started = time.perf_counter()
                if self._is_due(config.checkpoints.every):
                    self._save_checkpoint()
                if self._is_due(config.validation.every):
                    self._validate()
                meter.exclude(time.perf_counter() - started)

    def _progress_bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.config.training.max_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def _drop_ended_terms(self) -> None:
        """Let go of what only terms that have ended for good needed: tap, projector and teacher.

        Stopped projectors keep their weights but get no gradient, for which DDP would wait for ever: it is wrapped
        anew around what still trains.
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

    def _train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One optimiser step; returns the mean of the raw values over this process's micro-batches."""
        share = self.config.training.global_batch_size // self.accelerator.num_processes
        num_micro_batches = share // self.micro_batch_size
        sums: dict[str, torch.Tensor] = {}
        for index in range(num_micro_batches):
            batch = self._to_device(_next_batch(batches))
            with self._gradients_travel(index == num_micro_batches - 1):
                output = self.method(batch, self.step)
                self.accelerator.backward(output.loss / num_micro_batches)
            for name, value in {"loss": output.loss.detach(), **output.parts}.items():
                sums[name] = sums.get(name, 0.0) + value / num_micro_batches
        self._optimizer_step()
        return sums

    def _check_finite(self, values: dict[str, torch.Tensor]) -> None:
        """Stop before a loss that is not a number gets into a checkpoint; looked at when one or a log line is due."""
        due = self.step % self.config.training.log_every == 0 or self._is_due(self.config.checkpoints.every)
        if not due or bool(torch.isfinite(values["loss"])):
            return
        saved = checkpoint_folders(self.output_dir)
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise FloatingPointError(
            f"the loss at step {self.step} is {float(values['loss'])}; {last}: lower optimizer.lr, or check the data."
        )

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.training.max_steps)

    def _gradients_travel(self, last: bool) -> AbstractContextManager[Any]:
        # Between processes once per optimiser step, with the last micro-batch.
        return nullcontext() if last else self.accelerator.no_sync(self.student)

    def _optimizer_step(self) -> None:
        limit = self.config.optimizer.max_grad_norm
        if limit > 0:
            self.accelerator.clip_grad_norm_(self.student.parameters(), limit)
        self.optimizer.step()
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.replaced_images += int(batch["replaced"].sum())
        # Positions stay on the CPU, where the random numbers are drawn.
        device = self.accelerator.device
        moved = ("pixel_values", "moments", "class_labels")
        return {name: value.to(device, non_blocking=True) if name in moved else value for name, value in batch.items()}

    # -------------------------------------------------------------- reports

    def _announce(self) -> None:
        config, parts = self.config, self.parts
        transformer = parts.transformer
        precision = config.training.mixed_precision.replace("no", "full")
        logger.info(
            f"training {config.model.preset} ({transformer.num_parameters():,} parameters) with "
            f"{config.alignment.preset}: {config.training.max_steps} steps of {config.training.global_batch_size} "
            f"images on {self.accelerator.num_processes} process(es), {precision} precision"
        )
        weights = ", ".join(parts.criterion.terms) or "none"
        logger.info(f"alignment terms: {weights}; token grid {parts.student_grid[0]} x {parts.student_grid[1]}")
        warn_if_average_is_young(config.training.ema_decay, config.training.max_steps)

    def _log(self, meter: Meter, progress: tqdm[Any]) -> None:
        values = meter.collect(self.accelerator)
        values["lr"] = float(self.lr_schedule.get_last_lr()[0])
        terms = self.parts.criterion.terms
        values |= {f"weight/{name}": term.schedule(self.step - 1) for name, term in terms.items()}
        values["replaced_images"] = float(self._count_replaced())
        progress.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_second']:.1f} img/s")
        self.log.log(values, self.step)

    def _count_replaced(self) -> int:
        """Unreadable images replaced so far by all processes."""
        replaced = torch.tensor(self.replaced_images, device=self.accelerator.device)
        return int(self.accelerator.reduce(replaced, reduction="sum"))

    def _save_checkpoint(self) -> None:
        replaced_images = self._count_replaced()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = RunState(
                step=self.step,
                seed=self.config.seed,
                global_batch_size=self.config.training.global_batch_size,
                num_processes=self.accelerator.num_processes,
                dataset_fingerprint=self.parts.dataset.fingerprint,
                replaced_images=replaced_images,
                scaler=scaler.state_dict() if scaler is not None else {},
            )
            config_text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
            folder = checkpoints.save_checkpoint(
                self.output_dir, state, self.unwrapped, self.average, self.optimizer.optimizer, config_text
            )
            checkpoints.prune_checkpoints(self.output_dir, self.config.checkpoints.total_limit)
            logger.info(f"saved {folder}")
        self.accelerator.wait_for_everyone()

    def _validate(self) -> None:
        if self.accelerator.is_main_process:
            self.unwrapped.eval()
            with self.average.applied():
                images = validation.sample_images(
                    self.pipeline, self.validation_labels, self.config.validation, self.config.sampling
                )
            self.unwrapped.train()
            folder = self.output_dir / "validation" / f"step-{self.step}"
            grid = validation.write_validation(
                folder, self.pipeline, images, self.validation_labels, self.config.validation, self.config.sampling
            )
            self.log.log_image("validation", grid, self.step)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        if not self.accelerator.is_main_process:
            return
        self.unwrapped.eval()
        export.save_finished(self.pipeline, self.unwrapped, self.output_dir)
        publish.write_card(self.config, self.parts, self.output_dir, self.step, self.repository)
        logger.info(f"the finished pipeline is in {self.output_dir}")
        if self.repository is not None:
            publish.push(self.output_dir, self.repository, self.step)


def _next_batch(batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    try:
        return next(batches)
    except DataError as error:
        # A loader process wraps its error in a traceback; the last line is the sentence.
        raise DataError(
            str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        ) from None
