"""The two paths: their identities in float64, and the sampling of timesteps."""

import math

import pytest
import torch

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.interpolant import CosineInterpolant, LinearInterpolant, get_interpolant, timesteps_from_uniform


PATHS = [LinearInterpolant(), CosineInterpolant()]
by_name = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def _pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64)
    return x_0, noise, torch.tensor([0.05, 0.3, 0.5, 0.75, 0.99], dtype=torch.float64)


@by_name
def test_data_at_zero_and_noise_at_one(path) -> None:
    x_0, noise, _ = _pair()
    torch.testing.assert_close(path.interpolate(x_0, noise, torch.zeros(5, dtype=torch.float64)), x_0)
    torch.testing.assert_close(path.interpolate(x_0, noise, torch.ones(5, dtype=torch.float64)), noise)


@by_name
def test_velocity_is_the_time_derivative(path) -> None:
    x_0, noise, t = _pair()
    _, derivative = torch.func.jvp(lambda time: path.interpolate(x_0, noise, time), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.velocity(x_0, noise, t), derivative, rtol=1e-12, atol=1e-12)


@by_name
def test_round_trips(path) -> None:
    x_0, noise, t = _pair()
    x_t, velocity = path.interpolate(x_0, noise, t), path.velocity(x_0, noise, t)
    torch.testing.assert_close(path.velocity_to_sample(velocity, x_t, t), x_0, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(path.velocity_to_noise(velocity, x_t, t), noise, rtol=1e-10, atol=1e-12)
    score = path.velocity_to_score(velocity, x_t, t)
    sigma = path.sigma(t).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(score, -noise / sigma, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(path.score_to_velocity(score, x_t, t), velocity, rtol=1e-9, atol=1e-11)


def test_linear_formulas_written_out() -> None:
    x_0, noise, t = _pair()
    time = t.reshape(-1, 1, 1, 1)
    path = LinearInterpolant()
    torch.testing.assert_close(path.interpolate(x_0, noise, t), (1 - time) * x_0 + time * noise)
    torch.testing.assert_close(path.velocity(x_0, noise, t), noise - x_0)
    x_t, velocity = torch.sin(x_0), torch.cos(noise)
    torch.testing.assert_close(path.velocity_to_score(velocity, x_t, t), -((1 - time) * velocity + x_t) / time)


def test_cosine_noise_written_out() -> None:
    x_0, noise, t = _pair()
    angle = (math.pi / 2 * t).reshape(-1, 1, 1, 1)
    x_t, velocity = torch.sin(x_0), torch.cos(noise)
    expected = angle.sin() * x_t + (2 / math.pi) * angle.cos() * velocity
    torch.testing.assert_close(CosineInterpolant().velocity_to_noise(velocity, x_t, t), expected)


def test_scalar_time_broadcasts() -> None:
    x_0, noise, _ = _pair()
    x_t = LinearInterpolant().interpolate(x_0, noise, torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(x_t, 0.75 * x_0 + 0.25 * noise)


def test_uniform_timesteps_are_the_draws() -> None:
    draws = torch.linspace(0, 0.999, 7, dtype=torch.float64)
    assert torch.equal(timesteps_from_uniform(draws, LinearInterpolant()), draws)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.8, 0.5)])
def test_lognormal_timesteps_on_the_linear_path_are_a_sigmoid_of_a_normal(mean: float, std: float) -> None:
    # Standard normal quantiles from tables.
    draws = torch.tensor([0.025, 0.158655253931457, 0.5, 0.841344746068543, 0.975], dtype=torch.float64)
    normal = torch.tensor([-1.959963984540054, -1.0, 0.0, 1.0, 1.959963984540054], dtype=torch.float64)
    t = timesteps_from_uniform(draws, LinearInterpolant(), "lognormal", mean, std)
    torch.testing.assert_close(t, torch.sigmoid(mean + std * normal), rtol=1e-9, atol=1e-9)


def test_lognormal_timesteps_on_the_cosine_path() -> None:
    draws = torch.tensor([0.158655253931457, 0.5, 0.841344746068543], dtype=torch.float64)
    ratio = torch.exp(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    t = timesteps_from_uniform(draws, CosineInterpolant(), "lognormal")
    torch.testing.assert_close(t, 2 / math.pi * torch.atan(ratio), rtol=1e-9, atol=1e-9)


@by_name
def test_lognormal_timesteps_survive_the_edges(path) -> None:
    t = timesteps_from_uniform(torch.tensor([0.0, 1.0], dtype=torch.float64), path, "lognormal")
    assert torch.isfinite(t).all() and (t >= 0).all() and (t <= 1).all()


def test_unknown_names_are_errors_with_a_hint() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'linear'"):
        get_interpolant("linea")
    with pytest.raises(ConfigurationError, match="did you mean 'lognormal'"):
        timesteps_from_uniform(torch.rand(2), LinearInterpolant(), "logit_normal")
