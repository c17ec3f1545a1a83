"""The whole pipeline on the analytic field of the reference sampler's golden values."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin

from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler


# sum, sum of absolute values, first two and last two entries; all computed by the reference in float64
EULER = (-4.693019, 55.484174, -0.014120, 0.016211, -0.046281, -0.015961)
EULER_GUIDED = (-0.587757, 57.175605, 0.030389, 0.060727, -0.028476, 0.001843)
EM_ZERO = (-4.225395, 12.714804, -0.013110, -0.007171, -0.050446, -0.044508)
EM = (-4.192967, 21.244948, 0.151537, -0.047920, 0.053763, -0.156429)
EM_GUIDED = (0.209975, 21.597432, 0.200526, 0.000983, 0.073327, -0.136900)
HEUN = (-4.604934, 57.707519, -0.013824, 0.018121, -0.044554, -0.012623)


class GoldenField(ModelMixin, ConfigMixin, CacheMixin):
    """v(x, t, y) = tanh(0.7 x) + 0.3 t x + 0.02 (y mod 7) with null label 1000."""

    null_class_label = 1000

    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 4, patch_size: int = 1, num_classes: int = 1000):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor]:
        t = (timestep.double() / 1000).reshape(-1, 1, 1, 1)
        label = (class_labels % 7).double().reshape(-1, 1, 1, 1)
        velocity = torch.tanh(0.7 * hidden_states) + self.slope * t * hidden_states + 0.02 * label
        return (velocity,)


class PatternedNoise(FlowMatchEulerMaruyamaScheduler):
    """The k-th noise draw is `amplitude` cos(i + k) in flat order."""

    amplitude = 1.0

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        k = self.step_index or 0
        noise = torch.cos(torch.arange(sample.numel(), dtype=torch.float64) + k).reshape(sample.shape)
        return super().step(model_output, timestep, sample, variance_noise=self.amplitude * noise, **kwargs)


class NoNoise(PatternedNoise):
    amplitude = 0.0


class ReferenceHeun(FlowMatchHeunDiscreteScheduler):
    """diffusers' Heun solver on the reference's grid."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        sigmas = torch.linspace(1, 0, num_inference_steps + 1)
        self.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        self.timesteps = 1000 * self.sigmas[:-1]


def run(scheduler: Any, **kwargs: Any) -> torch.Tensor:
    pipe = SiTPipeline(GoldenField(), None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    latents = (1.5 * torch.sin(0.05 * torch.arange(128, dtype=torch.float64))).reshape(2, 4, 4, 4)
    result = pipe(class_labels=[1, 4], num_inference_steps=10, latents=latents, output_type="latent", **kwargs).images
    assert result.dtype == torch.float64
    return result


def summary(x: torch.Tensor) -> tuple[float, ...]:
    flat = x.flatten()
    return (flat.sum().item(), flat.abs().sum().item(), *flat[:2].tolist(), *flat[-2:].tolist())


@pytest.mark.parametrize(
    ("scheduler", "guidance", "expected"),
    [
        (FlowMatchEulerDiscreteScheduler(), {}, EULER),
        (
            FlowMatchEulerDiscreteScheduler(),
            {"guidance_scale": 1.8, "guidance_interval": (0.1, 0.7)},
            EULER_GUIDED,
        ),
        (ReferenceHeun(), {}, HEUN),
        (NoNoise(), {}, EM_ZERO),
        (PatternedNoise(), {}, EM),
        (PatternedNoise(), {"guidance_scale": 1.8, "guidance_interval": (0.0, 0.7)}, EM_GUIDED),
    ],
    ids=["euler", "euler-guided", "heun", "em-zero", "em", "em-guided"],
)
def test_golden_rows(scheduler: Any, guidance: dict[str, Any], expected: tuple[float, ...]) -> None:
    assert summary(run(scheduler, **guidance)) == pytest.approx(expected, abs=1e-5)


def test_guidance_scale_one_is_off() -> None:
    expected = pytest.approx(EULER, abs=1e-5)
    assert summary(run(FlowMatchEulerDiscreteScheduler(), guidance_scale=1.0)) == expected
    assert summary(run(FlowMatchEulerDiscreteScheduler(), guidance_scale=0.0)) == expected


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.35, 0.75)])
def test_heun_guides_both_evaluations_of_a_step_alike(interval: tuple[float, float]) -> None:
    """Against a plain loop: the guidance test uses the time at which the step begins."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    grid = [1.0, *torch.linspace(1, 0.001, 10, dtype=torch.float64)[1:].tolist(), 0.0]
    field, labels = GoldenField(), torch.tensor([1, 4])
    x = (1.5 * torch.sin(0.05 * torch.arange(128, dtype=torch.float64))).reshape(2, 4, 4, 4)

    def velocity(x: torch.Tensor, t: float, guided: bool) -> torch.Tensor:
        conditional = field(x, torch.tensor(1000 * t), labels)[0]
        if not guided:
            return conditional
        unconditional = field(x, torch.tensor(1000 * t), torch.full_like(labels, 1000))[0]
        return unconditional + 2.5 * (conditional - unconditional)

    with torch.no_grad():
        for t, next_t in zip(grid[:-1], grid[1:], strict=True):
            guided = interval[0] <= t <= interval[1]
            first = velocity(x, t, guided)
            predicted = x + (next_t - t) * first
            if next_t > 0:
                first = (first + velocity(predicted, next_t, guided)) / 2
            x = x + (next_t - t) * first
    actual = run(scheduler, guidance_scale=2.5, guidance_interval=interval)
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-5)
