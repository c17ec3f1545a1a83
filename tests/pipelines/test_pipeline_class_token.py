"""REG's class token: drawn, denoised and guided beside the latents, then dropped."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from tests.helpers.tiny_pipeline import generators, tiny_pipeline
from tests.helpers.tiny_sit import tiny_sit


DIM = 12


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    return tiny_pipeline(transformer=tiny_sit(class_token_dim=DIM))


def call(pipe: SiTPipeline, labels: Any = (1, 2), seeds: tuple[int, ...] = (0, 1), **kwargs: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": 5, "generator": generators(*seeds), "output_type": "latent", **kwargs}
    return pipe(list(labels), **arguments).images


def draw(sources: list[torch.Generator], *shape: int) -> torch.Tensor:
    return torch.cat([torch.randn(1, *shape, generator=source) for source in sources])


@torch.no_grad()
def plain_loop(
    transformer: Any, scale: float, token_scale: float, interval: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euler-Maruyama sampling of latents and class token, written out for the linear path."""
    sources, labels = generators(0, 1), torch.tensor([1, 2])
    x, c = draw(sources, 4, 8, 8), draw(sources, DIM)
    grid = [1.0, 0.76, 0.52, 0.28, 0.04, 0.0]
    for t, next_t in zip(grid[:-1], grid[1:], strict=True):
        conditional = transformer(x, 1000 * t, labels, class_token=c)
        v, u = conditional.sample, conditional.class_token
        if scale > 1 and interval[0] <= t <= interval[1]:
            unconditional = transformer(x, 1000 * t, torch.full_like(labels, 10), class_token=c)
            v = unconditional.sample + scale * (v - unconditional.sample)
            if token_scale > 0:
                u = unconditional.class_token + token_scale * (u - unconditional.class_token)
        dt = next_t - t
        x = x + ((2 - t) * v + x) * dt
        c = c + ((2 - t) * u + c) * dt
        if next_t > 0:
            diffusion = (2 * t * -dt) ** 0.5
            x = x + diffusion * draw(sources, 4, 8, 8)
            c = c + diffusion * draw(sources, DIM)
    return x, c


@pytest.mark.parametrize(
    ("scale", "token_scale", "interval"),
    [
        (1.0, 0.0, (0.0, 1.0)),
        (1.0, 3.0, (0.0, 1.0)),
        (2.3, 0.0, (0.0, 1.0)),
        (2.3, 2.3, (0.0, 1.0)),
        (2.3, 1.0, (0.0, 1.0)),
        (2.3, 3.0, (0.0, 0.85)),
        (2.3, 0.5, (0.2, 0.6)),
    ],
)
def test_against_a_plain_loop(
    pipe: SiTPipeline, scale: float, token_scale: float, interval: tuple[float, float]
) -> None:
    tokens = []

    def keep(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        tokens.append(tensors["class_token"])
        return tensors

    latents = call(
        pipe,
        guidance_scale=scale,
        class_token_guidance_scale=token_scale,
        guidance_interval=interval,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents", "class_token"],
    )
    expected, expected_token = plain_loop(pipe.transformer, scale, token_scale, interval)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens[-1], expected_token, rtol=0, atol=1e-4)


@torch.no_grad()
def test_against_a_plain_loop_on_the_cosine_path(pipe: SiTPipeline) -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler(path_type="cosine")
    cosine = tiny_pipeline(transformer=pipe.transformer, scheduler=scheduler)
    sources, labels = generators(0, 1), torch.tensor([1, 2])
    x, c = draw(sources, 4, 8, 8), draw(sources, DIM)
    grid = [1.0, 0.76, 0.52, 0.28, 0.04, 0.0]
    for t, next_t in zip(grid[:-1], grid[1:], strict=True):
        output = pipe.transformer(x, 1000 * t, labels, class_token=c)
        outputs = (output.sample, output.class_token)
        alpha, sigma, dt = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2), next_t - t
        noise = [draw(sources, *value.shape[1:]) if next_t > 0 else torch.zeros_like(value) for value in (x, c)]
        drifts = [v + t * (sigma * s + 2 / math.pi * alpha * v) / sigma for v, s in zip(outputs, (x, c), strict=True)]
        x, c = (
            state + drift * dt + (2 * t * -dt) ** 0.5 * eps
            for state, drift, eps in zip((x, c), drifts, noise, strict=True)
        )
    torch.testing.assert_close(call(cosine), x, rtol=0, atol=1e-4)


def test_the_pipelines_own_scheduler_makes_the_steps_of_the_latents_alone(pipe: SiTPipeline) -> None:
    states: list[int | None] = []

    def look(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        states.append(pipeline.scheduler.step_index)
        return tensors

    for scheduler in (FlowMatchEulerDiscreteScheduler(), FlowMatchEulerMaruyamaScheduler()):
        own = tiny_pipeline(transformer=pipe.transformer, scheduler=scheduler)
        states.clear()
        call(own, callback_on_step_end=look)
        assert own.scheduler is scheduler and states == [1, 2, 3, 4, 5], type(scheduler).__name__


def test_guidance_of_the_token_matters(pipe: SiTPipeline) -> None:
    results = [call(pipe, guidance_scale=2.0, class_token_guidance_scale=scale) for scale in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    assert not torch.allclose(results[0], results[2], atol=1e-3)


def test_every_image_depends_on_its_generator_alone(pipe: SiTPipeline) -> None:
    together = call(pipe, (1, 2, 1), (5, 6, 7), guidance_scale=2.0, class_token_guidance_scale=2.0)
    for row, (label, seed) in enumerate([(1, 5), (2, 6), (1, 7)]):
        alone = call(pipe, (label,), (seed,), guidance_scale=2.0, class_token_guidance_scale=2.0)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_token_has_a_scheduler_of_its_own(pipe: SiTPipeline, scheduler: Any) -> None:
    """A shared one would mix up the state of multistep solvers: all solvers must agree on one ODE."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    solve = tiny_pipeline(transformer=pipe.transformer, scheduler=scheduler)
    fine = tiny_pipeline(transformer=pipe.transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    exact = call(fine, latents=latents, num_inference_steps=200)
    result = call(solve, latents=latents, num_inference_steps=40)
    assert (result - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_callback_replaces_the_token(pipe: SiTPipeline) -> None:
    def clear(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        return {"class_token": torch.zeros(2, DIM)}

    assert not torch.allclose(call(pipe, callback_on_step_end=clear), call(pipe), atol=1e-3)


def test_float64_state(pipe: SiTPipeline) -> None:
    dtypes = set()

    def look(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        dtypes.add(tensors["class_token"].dtype)
        return tensors

    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    tensors = ["latents", "class_token"]
    result = call(pipe, latents=latents, callback_on_step_end=look, callback_on_step_end_tensor_inputs=tensors)
    assert dtypes == {torch.float64} == {result.dtype} and result.isfinite().all()


def test_save_load_and_images(pipe: SiTPipeline, tmp_path: Any) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(call(loaded), call(pipe), rtol=0, atol=0)
    assert call(loaded, output_type="pt").shape == (2, 3, 16, 16)


def test_without_a_class_token_there_is_none() -> None:
    seen = []

    def look(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append(tensors["class_token"])
        return tensors

    call(tiny_pipeline(), callback_on_step_end=look, callback_on_step_end_tensor_inputs=["class_token"])
    assert seen == [None] * 5
