"""Classifier-free guidance: where it acts, on which channels, and what it costs."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_srepa.pipelines.hub import SiTPipeline
from tests.helpers.tiny_pipeline import tiny_pipeline


STEPS = 5  # Euler at t = 1, 0.8, 0.6, 0.4, 0.2


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    return tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))


def call(pipe: SiTPipeline, **kwargs: Any) -> torch.Tensor:
    return pipe([1, 2], latents=noise(), num_inference_steps=STEPS, output_type="latent", **kwargs).images


@torch.no_grad()
def plain_loop(
    pipe: SiTPipeline, scale: float, interval: tuple[float, float] = (0.0, 1.0), channels: int = 4
) -> torch.Tensor:
    """Euler sampling written out, with two separate passes."""
    x, labels = noise(), torch.tensor([1, 2])
    for step in range(STEPS):
        t = 1 - step / STEPS
        velocity = pipe.transformer(x, 1000 * t, labels).sample
        if interval[0] - 1e-9 <= t <= interval[1] + 1e-9:
            unconditional = pipe.transformer(x, 1000 * t, torch.full_like(labels, 10)).sample
            guided = unconditional + scale * (velocity - unconditional)
            velocity = torch.cat([guided[:, :channels], velocity[:, channels:]], dim=1)
        x = x - velocity / STEPS
    return x


@pytest.mark.parametrize("scale", [1.0, 1.325, 4.0])
def test_scale(pipe: SiTPipeline, scale: float) -> None:
    torch.testing.assert_close(call(pipe, guidance_scale=scale), plain_loop(pipe, scale), rtol=0, atol=2e-5)
    assert pipe.guidance_scale == scale and pipe.do_classifier_free_guidance == (scale > 1)


@pytest.mark.parametrize(
    ("interval", "batch_sizes"),
    [
        ((0.0, 1.0), [4, 4, 4, 4, 4]),
        ((0.0, 0.7), [2, 2, 4, 4, 4]),
        ((0.4, 0.8), [2, 4, 4, 4, 2]),
        ((0.41, 0.79), [2, 2, 4, 2, 2]),
        ((0.6, 0.6), [2, 2, 4, 2, 2]),
        ((0.9, 0.95), [2, 2, 2, 2, 2]),
        ([1, 1], [4, 2, 2, 2, 2]),
    ],
)
def test_interval_includes_both_ends_and_halves_the_batch_outside(
    pipe: SiTPipeline, interval: Any, batch_sizes: list[int]
) -> None:
    sizes: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    actual = call(pipe, guidance_scale=3.0, guidance_interval=interval)
    hook.remove()
    assert sizes == batch_sizes
    torch.testing.assert_close(actual, plain_loop(pipe, 3.0, tuple(interval)), rtol=0, atol=2e-5)
    assert pipe.guidance_interval == tuple(interval)


def test_without_guidance_the_batch_is_never_doubled(pipe: SiTPipeline) -> None:
    sizes: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    call(pipe)
    hook.remove()
    assert sizes == [2] * STEPS


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(pipe: SiTPipeline, channels: int) -> None:
    expected = plain_loop(pipe, 3.0, channels=channels)
    torch.testing.assert_close(call(pipe, guidance_scale=3.0, guidance_channels=channels), expected, rtol=0, atol=2e-5)


def test_channels_of_the_pipeline_are_the_default(tmp_path: Any) -> None:
    pipe = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), guidance_channels=3)
    three, four = (plain_loop(pipe, 3.0, channels=channels) for channels in (3, 4))
    assert not torch.allclose(three, four, atol=1e-2)
    pipe.save_pretrained(tmp_path)
    pipe = SiTPipeline.from_pretrained(tmp_path)
    assert pipe.config.guidance_channels == 3
    torch.testing.assert_close(call(pipe, guidance_scale=3.0), three, rtol=0, atol=2e-5)
    torch.testing.assert_close(call(pipe, guidance_scale=3.0, guidance_channels=4), four, rtol=0, atol=2e-5)
