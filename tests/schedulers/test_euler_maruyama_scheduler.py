"""The Euler-Maruyama scheduler against the reference sampler's golden values and against its formulas' home."""

import copy
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_srepa.interpolant import get_interpolant
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler


# Rows of the reference sampler, all float64: sum, sum of absolute values, first two and last two entries.
GOLDEN = {
    ("linear", "zero"): (-4.225395, 12.714804, -0.013110, -0.007171, -0.050446, -0.044508),
    ("linear", "patterned"): (-4.192967, 21.244948, 0.151537, -0.047920, 0.053763, -0.156429),
    ("cosine", "zero"): (-4.748994, 24.092721, -0.014648, -0.002203, -0.054409, -0.041966),
}


def golden_velocity(x: torch.Tensor, t: float, labels: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.7 * x) + 0.3 * t * x + 0.02 * (labels % 7).to(x.dtype).reshape(-1, 1, 1, 1)


def golden_latents(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (1.5 * torch.sin(0.05 * torch.arange(128, dtype=torch.float64))).reshape(2, 4, 4, 4).to(dtype)


def pattern(k: int) -> torch.Tensor:
    return torch.cos(torch.arange(128, dtype=torch.float64) + k).reshape(2, 4, 4, 4)


def sample_golden(path_type: str, noise: str, dtype: torch.dtype) -> torch.Tensor:
    scheduler = FlowMatchEulerMaruyamaScheduler(path_type=path_type)
    scheduler.set_timesteps(10)
    x, labels = golden_latents(dtype), torch.tensor([1, 4])
    for k, timestep in enumerate(scheduler.timesteps):
        velocity = golden_velocity(x, timestep.item() / 1000, labels)
        draw = pattern(k) if noise == "patterned" else torch.zeros(2, 4, 4, 4)
        x = scheduler.step(velocity, timestep, x, variance_noise=draw).prev_sample
    return x


def summary(x: torch.Tensor) -> tuple[float, ...]:
    flat = x.double().flatten()
    return (flat.sum().item(), flat.abs().sum().item(), *flat[:2].tolist(), *flat[-2:].tolist())


@pytest.mark.parametrize(("path_type", "noise"), GOLDEN)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_golden_rows(path_type: str, noise: str, dtype: torch.dtype, tolerance: float) -> None:
    x = sample_golden(path_type, noise, dtype)
    assert x.dtype == dtype
    assert summary(x) == pytest.approx(GOLDEN[path_type, noise], abs=tolerance)


def test_grid() -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(250, device="cpu")
    expected = [1 - 0.96 * i / 249 for i in range(250)]
    assert scheduler.sigmas.dtype == torch.float64
    assert scheduler.sigmas.tolist() == pytest.approx([*expected, 0.0], abs=1e-15)
    assert (scheduler.sigmas[0] - scheduler.sigmas[1]).item() == pytest.approx(0.0038554, abs=1e-7)
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in expected], rel=1e-7)
    assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1 == 251
    assert scheduler.num_inference_steps == 250


def test_last_step_size_and_shortest_grid() -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler(last_step_size=0.25)
    scheduler.set_timesteps(np.int64(2))
    assert scheduler.sigmas.tolist() == [1.0, 0.25, 0.0]


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("index", [0, 3, 7])
def test_step_is_the_reverse_sde_of_the_path(path_type: str, index: int) -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler(path_type=path_type, diffusion_scale=1.3)
    scheduler.set_timesteps(8)
    x, velocity, noise = torch.randn(3, 2, 3, 5, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    t, next_t = scheduler.sigmas[index], scheduler.sigmas[index + 1]

    score = get_interpolant(path_type).velocity_to_score(velocity, x, t)
    w = 1.3 * t
    expected = x + (velocity - w / 2 * score) * (next_t - t)
    if index < 7:
        expected = expected + w.sqrt() * (t - next_t).sqrt() * noise
    actual = scheduler.step(velocity, scheduler.timesteps[index], x, variance_noise=noise).prev_sample
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_samples_follow_the_distribution_of_the_data(path_type: str) -> None:
    """Gaussian data of standard deviation 0.3, whose exact velocity is known; the last step loses a little spread."""
    path, scheduler = get_interpolant(path_type), FlowMatchEulerMaruyamaScheduler(path_type=path_type)
    scheduler.set_timesteps(250)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator)
    for timestep in scheduler.timesteps:
        t = timestep / 1000
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = (0.3 * alpha) ** 2 + sigma**2
        velocity = (path.d_alpha(t) * alpha * 0.09 + path.d_sigma(t) * sigma) / variance * x
        x = scheduler.step(velocity, timestep, x, generator=generator).prev_sample
    assert 0.28 < x.std().item() < 0.305
    assert abs(x.mean().item()) < 0.01


def test_noise_comes_from_the_generators() -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(5)
    x, velocity = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)

    def step(rows: list[int], seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        fresh = copy.deepcopy(scheduler)
        return fresh.step(velocity[rows], scheduler.timesteps[0], x[rows], generator=generators).prev_sample

    together = step([0, 1, 2], [5, 6, 7])
    for row, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(step([row], [seed])[0], together[row], rtol=0, atol=0)
    drawn = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(6))
    t, next_t = 1.0, 0.76
    expected = 1 + 1.0 * (next_t - t) + math.sqrt(2 * t * (t - next_t)) * drawn  # with v = 0 the drift is x
    torch.testing.assert_close(together[1:2], expected)


def test_last_step_draws_nothing() -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    x = torch.full((1, 1, 2, 2), 2.0)
    result = scheduler.step(torch.zeros_like(x), scheduler.timesteps[-1], x, generator=generator).prev_sample
    assert torch.equal(generator.get_state(), before)
    torch.testing.assert_close(result, x * (1 - 0.04))


def test_zero_diffusion_is_euler() -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler(diffusion_scale=0)
    scheduler.set_timesteps(4)
    x, velocity = torch.randn(2, 2, 1, 4, 4, generator=torch.manual_seed(0))
    result = scheduler.step(velocity, scheduler.timesteps[1], x).prev_sample
    torch.testing.assert_close(result, x + velocity * (scheduler.sigmas[2] - scheduler.sigmas[1]).item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_of_the_sample_is_kept_and_maths_is_float32_at_least(dtype: torch.dtype) -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(5)
    x, velocity = torch.randn(2, 2, 1, 4, 4, generator=torch.manual_seed(0)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    result = scheduler.step(velocity, scheduler.timesteps[1], x, generator=generator).prev_sample
    assert result.dtype == dtype

    t, next_t = 0.76, 0.52
    compute = torch.promote_types(dtype, torch.float32)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=compute)
    x, velocity = x.to(compute), velocity.to(compute)
    expected = x + ((2 - t) * velocity + x) * (next_t - t) + math.sqrt(2 * t * (t - next_t)) * noise
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 0)
    torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=tolerance)


def test_state_keeps_its_precision_under_a_half_precision_model() -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(5)
    x = torch.full((1, 1, 2, 2), 1 / 3)
    result = scheduler.step(torch.zeros_like(x, dtype=torch.bfloat16), scheduler.timesteps[-1], x).prev_sample
    torch.testing.assert_close(result, torch.full_like(x, 0.96 / 3), rtol=1e-7, atol=0)


def test_indices() -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler()
    assert len(scheduler) == 1000
    assert scheduler.step_index is None and scheduler.begin_index is None
    scheduler.set_timesteps(6)
    assert [scheduler.index_for_timestep(timestep) for timestep in scheduler.timesteps] == list(range(6))
    assert scheduler.index_for_timestep(scheduler.timesteps[4].item()) == 4
    assert scheduler.index_for_timestep(torch.tensor(3.0), torch.tensor([5.0, 3.0])) == 1

    x = torch.zeros(1, 1, 2, 2)
    scheduler.step(x, scheduler.timesteps[2], x)
    assert scheduler.step_index == 3
    scheduler.step(x, scheduler.timesteps[3], x)
    assert scheduler.step_index == 4

    scheduler.set_timesteps(6)
    assert scheduler.step_index is None and scheduler.begin_index is None
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2
    scheduler.step(x, scheduler.timesteps[2], x)
    assert scheduler.step_index == 3


def test_set_timesteps_begins_again() -> None:
    scheduler, x = FlowMatchEulerMaruyamaScheduler(), torch.ones(1, 1, 2, 2)
    runs = []
    for _ in range(2):
        scheduler.set_timesteps(3)
        state = x
        for timestep in scheduler.timesteps:
            (state,) = scheduler.step(torch.sin(state), timestep, state, variance_noise=x, return_dict=False)
        runs.append(state)
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("ready", [False, True])
def test_scale_noise_is_the_interpolant(path_type: str, ready: bool) -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler(path_type=path_type)
    if ready:
        scheduler.set_timesteps(10)
    x_0, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    timesteps = torch.tensor([0.0, 250.5, 1000.0], dtype=torch.float64)
    expected = get_interpolant(path_type).interpolate(x_0, noise, timesteps / 1000)
    torch.testing.assert_close(scheduler.scale_noise(x_0, timesteps, noise), expected, rtol=0, atol=1e-12)
    one = scheduler.scale_noise(x_0.bfloat16(), 250.5, noise.bfloat16())
    assert one.dtype == torch.bfloat16
    torch.testing.assert_close(one[1].double(), expected[1], rtol=0.02, atol=0.02)


def test_training_grid_before_set_timesteps() -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler()
    euler = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(scheduler.timesteps, euler.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.sigmas.float(), euler.sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"path_type": "vp"}, "'linear', 'cosine'"),
        ({"diffusion_scale": -1.0}, "diffusion_scale"),
        ({"diffusion_scale": float("nan")}, "diffusion_scale"),
        ({"last_step_size": 0.0}, "last_step_size"),
        ({"last_step_size": 1.0}, "last_step_size"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ],
)
def test_wrong_arguments(arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        FlowMatchEulerMaruyamaScheduler(**arguments)


@pytest.mark.parametrize("steps", [1, 0, -3, 2.5, True, None, "10"])
def test_wrong_number_of_steps(steps: object) -> None:
    with pytest.raises(ValueError, match="num_inference_steps.*at least 2"):
        FlowMatchEulerMaruyamaScheduler().set_timesteps(steps)


def test_wrong_steps() -> None:
    scheduler, x = FlowMatchEulerMaruyamaScheduler(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="call `set_timesteps` before"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(3)
    for index in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="integer 0"):
            scheduler.step(x, index, x)
    with pytest.raises(ValueError, match="not in the grid"):
        scheduler.step(x, 123.0, x)
    for timestep in scheduler.timesteps:
        scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match="All 3 steps"):
        scheduler.step(x, timestep, x)


def test_save_load_and_switching(tmp_path) -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler(path_type="cosine", diffusion_scale=1.0, last_step_size=0.02)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchEulerMaruyamaScheduler.from_pretrained(tmp_path)
    expected = {"path_type": "cosine", "diffusion_scale": 1.0, "last_step_size": 0.02, "num_train_timesteps": 1000}
    assert {key: loaded.config[key] for key in expected} == expected

    euler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    back = FlowMatchEulerMaruyamaScheduler.from_config(euler.config)
    assert back.config.num_train_timesteps == 1000
    assert back.config.path_type == "cosine"


@pytest.mark.gpu
def test_cuda() -> None:
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(5, device="cuda")
    assert scheduler.timesteps.device.type == "cuda" and scheduler.sigmas.device.type == "cpu"
    x, velocity = torch.randn(2, 2, 1, 4, 4, generator=torch.manual_seed(0))
    results = [
        copy.deepcopy(scheduler)
        .step(
            velocity.to(device),
            scheduler.timesteps[1],
            x.to(device),
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
        )
        .prev_sample.cpu()
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(*results)
