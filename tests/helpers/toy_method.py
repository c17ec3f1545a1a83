"""A transformer and a training method of somebody else's: nothing in the package knows their names.

`CriticMethod` trains three modules in two phases: a critic learns to tell how wrong the transformer's velocity is,
then transformer and gain learn from the flow loss and from the critic, through which their gradients pass.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from diffusers_srepa.configuration.options import option
from diffusers_srepa.configuration.training import RunConfig
from diffusers_srepa.interpolant import LinearInterpolant
from diffusers_srepa.latents.loading import load_latent_space
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.randomness import keyed_rand, keyed_randn
from diffusers_srepa.schedulers.registry import build_scheduler
from diffusers_srepa.training.method import LossOutput, Phase, StepContext, TrainingMethod


class ToyBlock(nn.Module):
    """A residual MLP, shifted by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return tokens + self.layers(self.norm(tokens) + condition[:, None])


class ToyTransformer(ModelMixin, ConfigMixin, CacheMixin):
    """Patches, residual MLPs and a linear head: a velocity model that is no SiT."""

    PRESETS = {"Toy-S/2": {"width": 12, "num_layers": 2, "patch_size": 2}}
    _no_split_modules = ["ToyBlock"]
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        patch_size: int = 2,
        in_channels: int = 4,
        width: int = 12,
        num_layers: int = 2,
        num_classes: int = 3,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.inner_dim = width
        self.null_class_label = num_classes if class_dropout_prob > 0 else None
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.time_embed = nn.Linear(1, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(num_layers))
        self.head = nn.ConvTranspose2d(width, in_channels, patch_size, stride=patch_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        class_drop_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The velocity of noisy latents (B, C, H, W) at timesteps 1000 t."""
        if class_drop_mask is not None:
            class_labels = class_labels.masked_fill(class_drop_mask, self.config.num_classes)
        condition = self.label_embed(class_labels) + self.time_embed(timestep[:, None].to(self.dtype) / 1000)
        maps = self.patch_embed(hidden_states)
        tokens = maps.flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens, condition)
        velocity = self.head(tokens.mT.unflatten(2, maps.shape[2:]))
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


@dataclass
class CriticConfig(RunConfig):
    """The options of a run with a critic."""

    critic_weight: float = option(0.1, "Weight of the critic's verdict in the transformer's loss.", minimum=0)


class Gain(nn.Module):
    """A factor for each channel of the velocity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, velocity: torch.Tensor) -> torch.Tensor:
        return velocity * self.factor


class CriticMethod(TrainingMethod):
    """See the module's text."""

    def __init__(self, config: CriticConfig) -> None:
        self.config = config
        self.latent_space = load_latent_space("pixels")
        self.modules = {}
        self.interpolant = LinearInterpolant()
        slower = replace(config.optimizer, lr=config.optimizer.lr / 2)
        self.phases = (
            Phase("critic", ("critic",), self.critic_loss, slower),
            Phase("generator", ("transformer", "gain"), self.generator_loss),
        )

    def prepare(self, dataset: Any) -> None:
        self.id2label = dataset.id2label
        transformer = ToyTransformer(
            sample_size=self.config.data.resolution, in_channels=3, num_classes=dataset.num_classes
        )
        critic = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.GELU(), nn.Flatten(), nn.LazyLinear(1))
        critic(torch.zeros(1, 3, self.config.data.resolution, self.config.data.resolution))
        self.modules = {"transformer": transformer, "gain": Gain(3), "critic": critic}

    def _predict(self, batch: Mapping[str, torch.Tensor], context: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted and true velocity."""
        seed, step, positions = self.config.seed, context.step, batch["position"].tolist()
        data = self.latent_space.encode_moments(batch["pixel_values"].float() / 255)[0]
        noise = keyed_randn(seed, "noise", step, positions, data.shape[1:]).to(data.device)
        t = keyed_rand(seed, "time", step, positions).float().to(data.device)
        noisy, target = self.interpolant.interpolate(data, noise, t), self.interpolant.velocity(data, noise, t)
        with context.autocast():
            velocity = context.modules["transformer"](noisy, t * 1000, batch["class_labels"]).sample
            return context.modules["gain"](velocity).float(), target

    def critic_loss(self, batch: Mapping[str, torch.Tensor], context: StepContext) -> LossOutput:
        with torch.no_grad():
            velocity, target = self._predict(batch, context)
        wrong = (velocity - target).square().mean((1, 2, 3))
        loss = (context.modules["critic"](velocity)[:, 0] - wrong).square().mean()
        return LossOutput(loss, {"critic": loss.detach()})

    def generator_loss(self, batch: Mapping[str, torch.Tensor], context: StepContext) -> LossOutput:
        velocity, target = self._predict(batch, context)
        flow = (velocity - target).square().mean()
        verdict = context.modules["critic"](velocity).mean()
        weight = self.config.critic_weight
        parts = {"flow": flow.detach(), "verdict": verdict.detach()}
        return LossOutput(flow + weight * verdict, parts, {"verdict": weight})

    def build_pipeline(self, modules: Mapping[str, nn.Module]) -> SiTPipeline:
        names = {str(index): name for index, name in (self.id2label or {}).items()}
        return SiTPipeline(modules["transformer"], None, build_scheduler("euler"), id2label=names or None)


def main(argv: list[str]) -> None:
    """Train by command line, as a script of the user's would."""
    from diffusers_srepa.configuration.command_line import load_config
    from diffusers_srepa.training.trainer import Trainer

    config = load_config(argv, CriticConfig)
    torch.manual_seed(config.seed)
    Trainer(config, method=CriticMethod(config)).train()


if __name__ == "__main__":
    # Under its own name, which is where a saved pipeline looks for the transformer.
    from tests.helpers import toy_method

    toy_method.main(sys.argv[1:])
