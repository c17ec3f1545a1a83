"""Flow matching on latents, with the tapped tokens of the student aligned with those of frozen teachers.

Total loss = flow + weighted alignment terms (sREPA, Eqs. 3-8), + REG's class token flow loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from torch.utils.data import IterableDataset

from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.registry import build_terms
from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import ConfigurationError, in_options
from diffusers_srepa.interpolant import get_interpolant, timesteps_from_uniform
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.latents.latent_space import LatentSpace
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.randomness import keyed_rand, keyed_randn
from diffusers_srepa.schedulers.registry import build_scheduler
from diffusers_srepa.tokens import TeacherFeatures
from diffusers_srepa.training.method import LossOutput, Phase, StepContext, TrainingMethod
from diffusers_srepa.training.methods.build import (
    build_latent_space,
    build_student,
    build_teacher,
    build_transformer,
    resolve_num_classes,
    student_patch_size,
    teacher_settings,
    token_grid,
)
from diffusers_srepa.training.methods.card_facts import alignment_facts
from diffusers_srepa.training.methods.checks import check_names


logger = get_logger(__name__)


class AlignedFlowMatching(TrainingMethod):
    """One trained module, the `AlignedDenoiser` called "student", in one phase.

    Args:
        config (`TrainingConfig`): resolved and validated.
        transformer (`nn.Module`, *optional*): the student's transformer, see `models/presets.py` for what it must
            have; by default a new one of `model.preset`, or that of `model.init_from`.

    Raises:
        ConfigurationError: what does not exist or does not fit, naming the option to change.
    """

    latent_space: LatentSpace  # type: ignore[assignment]

    def __init__(self, config: TrainingConfig, transformer: nn.Module | None = None) -> None:
        check_names(config)
        self.config = config
        self.given_transformer = transformer
        alignment = config.alignment
        # A null term was taken out of the preset; it stays in the configuration, which then means the same again.
        terms = {name: term for name, term in alignment.terms.items() if term is not None}
        self.criterion = AlignmentLoss(build_terms(terms, alignment.target_transform))
        with in_options({"path": "flow.path"}):
            self.interpolant = get_interpolant(config.flow.path)
        self.class_token_weight = alignment.class_token_weight
        self.latent_space = build_latent_space(config)
        self.grid = token_grid(config, self.latent_space, student_patch_size(config, transformer))
        self.teachers = {name: build_teacher(config, name, self.grid) for name in sorted(self.needed_teachers(step=0))}
        for term in self.criterion.terms.values():
            if term.teacher is not None:
                term.resample = term.resample or teacher_settings(config, term.teacher).resample
        self.needs_images = bool(self.teachers)
        self.modules = {}
        self.phases = (Phase("student", ("student",), self.loss),)

    def prepare(self, dataset: Any) -> None:
        config = self.config
        num_classes = resolve_num_classes(config, dataset.num_classes)
        if isinstance(dataset, IterableDataset):
            # A stream cannot look at all labels beforehand: it refuses one beyond the classes when it meets it.
            dataset.num_classes = num_classes  # type: ignore[attr-defined]
        self.id2label = dataset.id2label
        self.transformer = build_transformer(
            config, self.latent_space, num_classes, self.teachers.get(DEFAULT), self.given_transformer
        )
        self.student = build_student(config, self.transformer, self.teachers, self.criterion)
        if config.model.compile:
            # With the taps in place: a hook that comes after the first compiled call never fires.
            self.transformer.compile_repeated_blocks()
        self.modules = {"student": self.student}

    def to(self, device: torch.device) -> None:
        super().to(device)
        for teacher in self.teachers.values():
            teacher.to(device)

    def loss(self, batch: Mapping[str, torch.Tensor], context: StepContext) -> LossOutput:
        """Loss of one micro-batch.

        Args:
            batch (`Mapping[str, torch.Tensor]`): `class_labels` (B,), `position` (B,) in the global batch, and
                `pixel_values` (B, 3, H, W) uint8 and/or `moments` (B, 2C, h, w) float on the device.
            context (`StepContext`): step, modules and precision.

        Returns:
            `LossOutput`: with the parts `flow`, `class_token` (REG) and `alignment/<term>`.
        """
        step, positions = context.step, batch["position"].tolist()
        images = batch["pixel_values"].float() / 255 if "pixel_values" in batch else None
        features = self._teacher_features(images, context)
        latents = self._latents(batch, images, step, positions)
        t = self._times(step, positions).to(latents.device)
        noisy, target = self._noise(latents, "noise", t, step, positions)
        inputs = {"class_labels": batch["class_labels"]}
        if self._class_dropout_prob > 0:
            drop = keyed_rand(self.config.seed, "class_drop", step, positions) < self._class_dropout_prob
            inputs["class_drop_mask"] = drop.to(latents.device)
        class_token_target = None
        if self.class_token_weight is not None:
            class_token = self._class_token(features)
            inputs["class_token"], class_token_target = self._noise(
                class_token, "class_token_noise", t, step, positions
            )
        # Accelerate wraps the student in autocast too, but not when it is sharded.
        with context.autocast():
            velocity, tokens, *class_token_velocity = context.modules["student"](
                noisy, t * self._timestep_scale, **inputs
            )
        parts = {"flow": (velocity.float() - target).square().mean()}
        loss = parts["flow"]
        if class_token_target is not None:
            parts["class_token"] = (class_token_velocity[0].float() - class_token_target).square().mean()
            loss = loss + self.class_token_weight * parts["class_token"]
        alignment = self.criterion(tokens, features, step=step)
        parts |= {f"alignment/{name}": value for name, value in alignment.values.items()}
        raw = {name: value.detach() for name, value in parts.items()}
        return LossOutput(loss + alignment.loss, raw, dict(alignment.weights))

    def release(self, step: int) -> set[str]:
        """Let go of what only terms that have ended for good needed: tap, projector and teacher."""
        ended = set(self.student.features) - set(self.criterion.features(step))
        if not ended:
            return set()
        self.student.stop_features(ended)
        needed = self.needed_teachers(step)
        self.teachers = {name: teacher for name, teacher in self.teachers.items() if name in needed}
        logger.info(f"step {step}: {len(ended)} aligned feature(s) have ended and are dropped")
        return {"student"}

    def needed_teachers(self, step: int) -> set[str]:
        """The teachers that a term, or the class token, still needs at `step`."""
        return {*self.criterion.teachers(step), *([] if self.class_token_weight is None else [DEFAULT])}

    def build_pipeline(self, modules: Mapping[str, nn.Module]) -> SiTPipeline:
        student: Any = modules["student"]
        return SiTPipeline(
            transformer=student.transformer,
            vae=self._publishable_vae,
            scheduler=build_scheduler(self.config.sampling.scheduler, self.config.flow.path),
            id2label=None if self.id2label is None else {str(index): name for index, name in self.id2label.items()},
            guidance_channels=self.config.sampling.guidance_channels,
        )

    @cached_property
    def _publishable_vae(self) -> Any:
        """The autoencoder in float32; one in half precision is loaded again, so that nothing is rounded."""
        space = self.latent_space
        if not isinstance(space, AutoencoderKLLatents):
            return None
        if space.vae.dtype == torch.float32:
            return space.vae
        latents = self.config.latents
        full = AutoencoderKLLatents.from_pretrained(
            latents.vae, subfolder=latents.subfolder, revision=latents.revision
        )
        return full.to(space.vae.device).vae

    def autoencoder_reference(self) -> dict[str, Any] | None:
        space, latents = self.latent_space, self.config.latents
        if not isinstance(space, AutoencoderKLLatents):
            return None
        name = str(Path(latents.vae).resolve()) if Path(latents.vae).exists() else latents.vae
        return {
            "pretrained_model_name_or_path": name,
            "subfolder": latents.subfolder,
            "revision": latents.revision,
            "encoder_id": self._publishable_encoder_id,
        }

    @cached_property
    def _publishable_encoder_id(self) -> str:
        return AutoencoderKLLatents(self._publishable_vae).encoder_id

    def describe(self) -> list[str]:
        terms = ", ".join(self.criterion.terms) or "none"
        grid = f"{self.grid[0]} x {self.grid[1]}"
        return [
            f"{self.config.model.preset} ({self.transformer.num_parameters():,} parameters) with "
            f"{self.config.alignment.preset}",
            f"alignment terms: {terms}; token grid {grid}",
        ]

    def card_facts(self) -> dict[str, Any]:
        return alignment_facts(self.config, self.transformer)

    @property
    def _class_dropout_prob(self) -> float:
        return float(self.transformer.config.class_dropout_prob)

    @property
    def _timestep_scale(self) -> float:
        return float(self.transformer.config.get("timestep_scale", 1000.0))

    def _noise(
        self, data: torch.Tensor, stream: str, t: torch.Tensor, step: int, positions: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noised data and the velocity to predict."""
        noise = self._draw(stream, step, positions, data)
        return self.interpolant.interpolate(data, noise, t), self.interpolant.velocity(data, noise, t)

    def _class_token(self, features: Mapping[str, TeacherFeatures]) -> torch.Tensor:
        class_token = features[DEFAULT].class_token if DEFAULT in features else None
        if class_token is None:
            raise ConfigurationError(
                "alignment.class_token_weight is set, but the teacher gives no class token: choose one that does."
            )
        return class_token

    def _latents(
        self, batch: Mapping[str, torch.Tensor], images: torch.Tensor | None, step: int, positions: list[int]
    ) -> torch.Tensor:
        with torch.no_grad():
            if "moments" in batch:
                mean, std = batch["moments"].float().chunk(2, dim=1)
            else:
                assert images is not None, "a batch carries images or moments"
                mean, std = self.latent_space.encode_moments(images)
            return self.latent_space.sample(mean, std, self._draw("vae", step, positions, mean))

    def _times(self, step: int, positions: list[int]) -> torch.Tensor:
        uniform = keyed_rand(self.config.seed, "time", step, positions)
        flow = self.config.flow
        times = timesteps_from_uniform(
            uniform, self.interpolant, flow.timestep_sampling, flow.lognormal_mean, flow.lognormal_std
        )
        return times.float()

    def _draw(self, stream: str, step: int, positions: list[int], like: torch.Tensor) -> torch.Tensor:
        return keyed_randn(self.config.seed, stream, step, positions, like.shape[1:]).to(like.device)

    def _teacher_features(self, images: torch.Tensor | None, context: StepContext) -> dict[str, TeacherFeatures]:
        if images is None:
            return {}
        with context.autocast():
            needed = sorted(self.needed_teachers(context.step))
            return {name: self.teachers[name](images) for name in needed}
