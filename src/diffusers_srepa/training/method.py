"""Where the two rivers meet: flow matching on latents and alignment of the tapped tokens with the teacher.

`method(batch, step)` returns the loss of a micro-batch and its named parts. The trainer knows nothing else about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.interpolant import Interpolant, timesteps_from_uniform
from diffusers_srepa.latents.latent_space import LatentSpace
from diffusers_srepa.randomness import keyed_rand, keyed_randn
from diffusers_srepa.teachers.auto_teacher import Teacher
from diffusers_srepa.tokens import TeacherFeatures
from diffusers_srepa.training.config_sections import FlowConfig


@dataclass
class MethodOutput:
    """The loss of a micro-batch.

    Args:
        loss (`torch.Tensor`): scalar with gradient, the weighted sum of the parts.
        parts (`dict[str, torch.Tensor]`): raw detached scalars by name: `flow`, `class_token`,
            `alignment/<term>`.
        weights (`dict[str, float]`): weights of the alignment terms at this step, by name.
    """

    loss: torch.Tensor
    parts: dict[str, torch.Tensor]
    weights: dict[str, float]


class AlignedFlowMatching:
    """Total loss = flow + weighted alignment terms (paper Eqs. 3-8), + REG's class token flow loss.

    Args:
        student (`nn.Module`): the (wrapped) `AlignedDenoiser`.
        codec (`LatentSpace`): images to latents.
        teachers (`Mapping[str, Teacher]`): by name; called as long as a term has their tokens as target.
        criterion (`AlignmentLoss`): the terms.
        interpolant (`Interpolant`): the path.
        flow (`FlowConfig`): the law of the training times.
        seed (`int`): seed of the run.
        class_dropout_prob (`float`): share of labels that become the null class.
        class_token_weight (`float`, *optional*): weight of the class token's flow loss (REG), None without one.
        timestep_scale (`float`): the transformer's timestep for t = 1.
        autocast (`Callable`, *optional*): context in which teacher and student run.
    """

    def __init__(
        self,
        student: nn.Module,
        codec: LatentSpace,
        teachers: Mapping[str, Teacher],
        criterion: AlignmentLoss,
        interpolant: Interpolant,
        flow: FlowConfig,
        *,
        seed: int,
        class_dropout_prob: float,
        timestep_scale: float,
        class_token_weight: float | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.student = student
        self.codec = codec
        self.teachers = dict(teachers)
        self.criterion = criterion
        self.interpolant = interpolant
        self.flow = flow
        self.seed = seed
        self.class_dropout_prob = class_dropout_prob
        self.timestep_scale = timestep_scale
        self.class_token_weight = class_token_weight
        self.autocast = autocast

    def __call__(self, batch: Mapping[str, torch.Tensor], step: int) -> MethodOutput:
        """Loss of one micro-batch.

        Args:
            batch (`Mapping[str, torch.Tensor]`): `class_labels` (B,), `position` (B,) in the global batch, and
                `pixel_values` (B, 3, H, W) uint8 and/or `moments` (B, 2C, h, w) float on the device.
            step (`int`): optimiser steps made before this one.
        """
        positions = batch["position"].tolist()
        images = batch["pixel_values"].float() / 255 if "pixel_values" in batch else None
        features = self._teacher_features(images, step)
        latents = self._latents(batch, images, step, positions)
        t = self._times(step, positions).to(latents.device)
        noisy, target = self._noise(latents, "noise", t, step, positions)
        inputs = {"class_labels": batch["class_labels"]}
        if self.class_dropout_prob > 0:
            drop = keyed_rand(self.seed, "class_drop", step, positions) < self.class_dropout_prob
            inputs["class_drop_mask"] = drop.to(latents.device)
        class_token_target = None
        if self.class_token_weight is not None:
            class_token = self._class_token(features)
            inputs["class_token"], class_token_target = self._noise(
                class_token, "class_token_noise", t, step, positions
            )
        # Accelerate wraps the student in autocast too, but not when it is sharded.
        with self.autocast():
            velocity, tokens, *class_token_velocity = self.student(noisy, t * self.timestep_scale, **inputs)
        parts = {"flow": (velocity.float() - target).square().mean()}
        loss = parts["flow"]
        if class_token_target is not None:
            parts["class_token"] = (class_token_velocity[0].float() - class_token_target).square().mean()
            loss = loss + self.class_token_weight * parts["class_token"]
        alignment = self.criterion(tokens, features, step=step)
        parts |= {f"alignment/{name}": value for name, value in alignment.values.items()}
        raw = {name: value.detach() for name, value in parts.items()}
        return MethodOutput(loss + alignment.loss, raw, dict(alignment.weights))

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
                mean, std = self.codec.encode_moments(images)
            return self.codec.sample(mean, std, self._draw("vae", step, positions, mean))

    def _times(self, step: int, positions: list[int]) -> torch.Tensor:
        uniform = keyed_rand(self.seed, "time", step, positions)
        flow = self.flow
        times = timesteps_from_uniform(
            uniform, self.interpolant, flow.timestep_law, flow.lognormal_mean, flow.lognormal_std
        )
        return times.float()

    def _draw(self, stream: str, step: int, positions: list[int], like: torch.Tensor) -> torch.Tensor:
        return keyed_randn(self.seed, stream, step, positions, like.shape[1:]).to(like.device)

    def needed_teachers(self, step: int) -> set[str]:
        """The teachers that a term, or the class token, still needs at `step`."""
        return {*self.criterion.teachers(step), *([] if self.class_token_weight is None else [DEFAULT])}

    def _teacher_features(self, images: torch.Tensor | None, step: int) -> dict[str, TeacherFeatures]:
        if images is None:
            return {}
        with self.autocast():
            return {name: self.teachers[name](images) for name in sorted(self.needed_teachers(step))}
