"""Calls of the pipeline: batches, sizes, outputs, callbacks, schedulers, precision."""

import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback

from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.pipelines.hub import SiTPipeline
from tests.helpers.tiny_autoencoder import tiny_autoencoder
from tests.helpers.tiny_pipeline import generators, tiny_pipeline
from tests.helpers.tiny_sit import tiny_sit


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    return tiny_pipeline()


def call(pipe: SiTPipeline, labels: Any = (1, 2), seeds: tuple[int, ...] = (0, 1), **kwargs: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt", **kwargs}
    arguments.setdefault("generator", generators(*seeds))
    return pipe(class_labels=list(labels), **arguments).images


def test_every_image_depends_on_its_generator_alone(pipe: SiTPipeline) -> None:
    together = call(pipe, (1, 2, 1), (5, 6, 7), output_type="latent")
    for row, (label, seed) in enumerate([(1, 5), (2, 6), (1, 7)]):
        alone = call(pipe, (label,), (seed,), output_type="latent")
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_num_images_per_prompt_repeats_each_label(pipe: SiTPipeline) -> None:
    repeated = call(pipe, (1, 2), (5, 6, 7, 8), num_images_per_prompt=2, output_type="latent")
    spelled_out = call(pipe, (1, 1, 2, 2), (5, 6, 7, 8), output_type="latent")
    torch.testing.assert_close(repeated, spelled_out, rtol=0, atol=0)


def test_one_generator_for_the_batch(pipe: SiTPipeline) -> None:
    images = [call(pipe, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert images[0].shape == (2, 3, 16, 16)
    torch.testing.assert_close(*images, rtol=0, atol=0)
    assert not torch.allclose(images[0][0], images[0][1], atol=1e-3)


def test_output_types_agree(pipe: SiTPipeline) -> None:
    latents = call(pipe, output_type="latent")
    assert latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float32
    decoded = AutoencoderKLLatents(pipe.vae).decode(latents)
    tensor = call(pipe, output_type="pt")
    torch.testing.assert_close(tensor, decoded, rtol=0, atol=1e-6)
    array = call(pipe, output_type="np")
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pictures = call(pipe, output_type="pil")
    assert [picture.size for picture in pictures] == [(16, 16), (16, 16)]
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in pictures]), (array * 255).round())


def test_tuple_output(pipe: SiTPipeline) -> None:
    output = pipe(1, generator=generators(0), num_inference_steps=2, output_type="pt", return_dict=False)
    assert isinstance(output, tuple) and len(output) == 1
    expected = pipe(1, generator=generators(0), num_inference_steps=2, output_type="pt")
    torch.testing.assert_close(output[0], expected.images)
    torch.testing.assert_close(output[0], expected[0])


def test_scale_and_shift_may_be_missing() -> None:
    pipe = tiny_pipeline(vae=tiny_autoencoder(scaling_factor=None, shift_factor=None).eval())
    latents = call(pipe, output_type="latent")
    with torch.no_grad():
        expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(call(pipe), expected, rtol=0, atol=1e-6)


def test_pixel_space() -> None:
    pipe = tiny_pipeline(transformer=tiny_sit(in_channels=3), vae=None)
    latents = call(pipe, output_type="latent")
    torch.testing.assert_close(call(pipe), (latents / 2 + 0.5).clamp(0, 1))
    picture = call(pipe, output_type="pil")[0]
    assert picture.size == (8, 8) and picture.mode == "RGB"
    grey = tiny_pipeline(transformer=tiny_sit(in_channels=1), vae=None)
    assert call(grey, output_type="pil")[0].mode == "L"


def test_size_in_pixels(pipe: SiTPipeline) -> None:
    assert call(pipe, height=24, width=8).shape == (2, 3, 24, 8)
    assert call(pipe, width=20).shape == (2, 3, 16, 20)
    rectangular = tiny_pipeline(transformer=tiny_sit(sample_size=(4, 8)))
    assert call(rectangular).shape == (2, 3, 8, 16)


def test_given_latents(pipe: SiTPipeline) -> None:
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators(0, 1)])
    copy = latents.clone()
    spent = generators(0, 1)
    for generator in spent:
        torch.randn(1, 4, 8, 8, generator=generator)
    torch.testing.assert_close(call(pipe, latents=latents, generator=spent), call(pipe), rtol=0, atol=1e-6)
    assert torch.equal(latents, copy)
    assert call(pipe, latents=torch.zeros(2, 4, 4, 6)).shape == (2, 3, 8, 12)


@pytest.mark.parametrize(
    ("given", "state"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_precision_of_the_state(pipe: SiTPipeline, given: torch.dtype, state: torch.dtype) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0)).to(given)
    assert call(pipe, latents=latents, output_type="latent").dtype == state
    assert call(pipe, latents=latents).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision(pipe: SiTPipeline, dtype: torch.dtype, tolerance: float) -> None:
    half = tiny_pipeline().to(dtype)
    assert half.transformer.dtype == half.vae.dtype == dtype
    latents = call(half, output_type="latent")
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, call(pipe, output_type="latent"), rtol=0, atol=tolerance)
    assert call(half).isfinite().all()
    assert call(half, output_type="np").dtype == np.float32


def test_train_mode_does_not_drop_labels(pipe: SiTPipeline) -> None:
    training = tiny_pipeline(transformer=tiny_sit(class_dropout_prob=0.9).train())
    torch.testing.assert_close(call(training), call(pipe), rtol=0, atol=0)
    without_null = tiny_pipeline(transformer=tiny_sit(class_dropout_prob=0.0).train())
    assert call(without_null, guidance_scale=1.0).isfinite().all()


def test_no_gradients(pipe: SiTPipeline) -> None:
    assert not call(pipe).requires_grad


# Schedulers


def solve(scheduler: Any, steps: int) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    pipe = tiny_pipeline(scheduler=scheduler)
    return call(pipe, latents=latents, num_inference_steps=steps, output_type="latent", guidance_scale=1.5)


@pytest.fixture(scope="module")
def fine_euler_run() -> torch.Tensor:
    return solve(FlowMatchEulerDiscreteScheduler(), 400)


@pytest.mark.parametrize(
    ("solver", "options", "tolerance"),
    [
        (FlowMatchHeunDiscreteScheduler, {}, 2e-3),
        (UniPCMultistepScheduler, FLOW, 2e-3),
        (DPMSolverMultistepScheduler, FLOW, 2e-2),
        (LTXEulerAncestralRFScheduler, {"eta": 0.0}, 2e-2),
    ],
)
def test_solvers_of_diffusers_agree(
    solver: Any, options: dict[str, Any], tolerance: float, fine_euler_run: torch.Tensor
) -> None:
    error = (solve(solver(**options), 20) - fine_euler_run).abs().mean()
    assert error < tolerance * fine_euler_run.abs().mean()


def test_grid_of_euler_is_even(pipe: SiTPipeline) -> None:
    euler = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    call(euler, num_inference_steps=4)
    assert euler.scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert euler.num_timesteps == 4
    call(euler, num_inference_steps=1)
    assert euler.scheduler.sigmas.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.1], np.array([1.0, 0.5, 0.1])])
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(**FLOW)])
def test_own_sigmas(scheduler: Any, sigmas: Any) -> None:
    pipe = tiny_pipeline(scheduler=scheduler)
    call(pipe, sigmas=sigmas)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.5, 0.1, 0.0], abs=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "steps", "evaluations"),
    [
        (FlowMatchEulerDiscreteScheduler(), 5, 5),
        (FlowMatchHeunDiscreteScheduler(), 5, 9),
    ],
    ids=["euler", "heun"],
)
def test_progress_bar_counts_steps(scheduler: Any, steps: int, evaluations: int) -> None:
    pipe, screen = tiny_pipeline(scheduler=scheduler), io.StringIO()
    pipe.set_progress_bar_config(file=screen, mininterval=0, miniters=1)
    call(pipe, num_inference_steps=steps)
    assert pipe.num_timesteps == evaluations
    shown = [int(done) for done in re.findall(rf"(\d+)/{steps} ", screen.getvalue())]
    assert sorted(set(shown)) == list(range(steps + 1))
    assert f"{steps}/{steps} " in screen.getvalue().rstrip().split("\r")[-1]


# Callbacks


def test_callback_sees_and_replaces_tensors(pipe: SiTPipeline) -> None:
    seen = []

    def record(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        assert pipeline.current_timestep is timestep
        assert set(tensors) == set(pipeline._callback_tensor_inputs)
        seen.append((step, timestep.item(), tensors["latents"].clone()))
        return tensors

    latents = call(
        pipe,
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs,
        output_type="latent",
    )
    assert [(step, timestep) for step, timestep, _ in seen] == [(0, 1000.0), (1, 520.0), (2, 40.0)]
    assert torch.equal(seen[-1][2], latents)
    assert pipe.current_timestep is None

    def clear(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipeline.num_timesteps - 1 else {}

    assert call(pipe, callback_on_step_end=clear, output_type="latent").abs().sum() == 0


def test_callback_changes_guidance(pipe: SiTPipeline) -> None:
    def stop_guiding(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        pipeline._guidance_scale = 1.0
        return tensors

    sizes = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    call(pipe, callback_on_step_end=stop_guiding)
    hook.remove()
    assert sizes == [4, 2, 2]
    assert pipe.guidance_scale == 1.0 and not pipe.do_classifier_free_guidance

    def increase(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        pipeline._guidance_scale += 1.0
        return tensors

    call(pipe, callback_on_step_end=increase)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_callback_interrupts(pipe: SiTPipeline) -> None:
    steps = []

    def stop(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        steps.append(tensors["latents"])
        pipeline._interrupt = step == 1
        return tensors

    latents = call(pipe, num_inference_steps=5, callback_on_step_end=stop, output_type="latent")
    assert len(steps) == 2 and torch.equal(latents, steps[-1])
    assert call(pipe).isfinite().all() and not pipe.interrupt


def test_callback_object(pipe: SiTPipeline) -> None:
    class Count(PipelineCallback):
        tensor_inputs = ["latents"]
        calls = 0

        def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict) -> dict:
            self.calls += 1
            return callback_kwargs

    count = Count()
    call(pipe, callback_on_step_end=count)
    assert count.calls == 3


# Hooks of diffusers


CACHES = {
    "first-block": lambda timestep: FirstBlockCacheConfig(threshold=1e3),
    "attention-broadcast": lambda timestep: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        spatial_attention_block_identifiers=["transformer_blocks"],
        current_timestep_callback=timestep,
    ),
    "mag": lambda timestep: MagCacheConfig(num_inference_steps=8, mag_ratios=[1.0] * 8),
    "faster": lambda timestep: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=timestep,
        tensor_format="BCHW",
        _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
    ),
}


@pytest.mark.parametrize(
    ("cache", "interval"),
    [(cache, (0.0, 1.0)) for cache in CACHES]
    # FasterCache itself expects a guided batch at every step.
    + [(cache, (0.2, 0.7)) for cache in CACHES if cache != "faster"],
)
def test_caches(cache: str, interval: tuple[float, float]) -> None:
    """Outside the guidance interval the batch is half as big, which a cached tensor must not survive."""
    pipe = tiny_pipeline()
    arguments: dict[str, Any] = {"num_inference_steps": 8, "guidance_interval": interval, "output_type": "latent"}
    plain = call(pipe, **arguments)
    pipe.transformer.enable_cache(CACHES[cache](lambda: pipe.current_timestep))
    cached = call(pipe, **arguments)
    assert cached.isfinite().all() and not torch.equal(cached, plain)
    torch.testing.assert_close(call(pipe, **arguments), cached, rtol=0, atol=0)
    pipe.transformer.disable_cache()
    torch.testing.assert_close(call(pipe, **arguments), plain, rtol=0, atol=0)


def test_model_offload(pipe: SiTPipeline) -> None:
    expected = call(pipe)
    offloaded = tiny_pipeline()
    offloaded.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(call(offloaded), expected, rtol=0, atol=0)
    assert all(hasattr(module, "_hf_hook") for module in (offloaded.transformer, offloaded.vae))


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cuda(pipe: SiTPipeline, place: str) -> None:
    placed = tiny_pipeline()
    getattr(placed, place)(device="cuda")
    for _ in range(2):
        torch.testing.assert_close(call(placed).cpu(), call(pipe), rtol=0, atol=1e-3)


def test_slicing_and_tiling_of_the_autoencoder(pipe: SiTPipeline) -> None:
    sliced = tiny_pipeline()
    sliced.vae.enable_slicing()
    torch.testing.assert_close(call(sliced), call(pipe), rtol=0, atol=1e-5)
    sliced.vae.enable_tiling()
    assert call(sliced, height=64, width=32).shape == (2, 3, 64, 32)


def test_compiled_transformer(pipe: SiTPipeline, tmp_path: Any) -> None:
    compiled = tiny_pipeline()
    compiled.transformer = torch.compile(compiled.transformer, backend="eager")
    torch.testing.assert_close(call(compiled), call(pipe), rtol=0, atol=1e-5)
    compiled.save_pretrained(tmp_path)
    torch.testing.assert_close(call(SiTPipeline.from_pretrained(tmp_path)), call(pipe), rtol=0, atol=1e-5)
