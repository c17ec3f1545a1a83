"""Paths between data and noise: the only home of the time direction.

Time t is in [0, 1] with t = 0 at the data and t = 1 at the noise, as in diffusers and REPA:

    x_t = alpha(t) x_0 + sigma(t) eps,        v = d_alpha(t) x_0 + d_sigma(t) eps.

The paper's Eqs. 1-3 count t the other way (t = 1 is data); a mirrored pair of path and target gives the same loss.
Every function takes t of shape `(B,)` (or a scalar) and broadcasts it over tensors of shape `(B, ...)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from diffusers_srepa.errors import ConfigurationError, close_matches


#: How training times are drawn.
TIMESTEP_SAMPLINGS = ("uniform", "lognormal")


def expand_time(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`t` of shape `(B,)` or `()` reshaped so that it broadcasts over `like` of shape `(B, ...)`."""
    return t if t.ndim == 0 else t.reshape(-1, *([1] * (like.ndim - 1)))


class Interpolant(ABC):
    """A path x_t = alpha(t) x_0 + sigma(t) eps from data (t = 0) to noise (t = 1)."""

    name: str

    @abstractmethod
    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the data, 1 at t = 0 and 0 at t = 1."""

    @abstractmethod
    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the noise, 0 at t = 0 and 1 at t = 1."""

    @abstractmethod
    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The derivative of `alpha` with respect to t."""

    @abstractmethod
    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The derivative of `sigma` with respect to t."""

    @abstractmethod
    def time_of_noise_ratio(self, ratio: torch.Tensor) -> torch.Tensor:
        """The t at which sigma(t) / alpha(t) equals `ratio`, a positive tensor."""

    def interpolate(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t for data `x_0` and `noise` of shape `(B, ...)`."""
        t = expand_time(t, x_0)
        return self.alpha(t) * x_0 + self.sigma(t) * noise

    def velocity(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The regression target d x_t / d t; eps - x_0 on the linear path."""
        t = expand_time(t, x_0)
        return self.d_alpha(t) * x_0 + self.d_sigma(t) * noise

    def velocity_to_sample(self, velocity: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The data behind `velocity` at `x_t`: x_0 = (d_sigma x_t - sigma v) / (alpha d_sigma - d_alpha sigma)."""
        t = expand_time(t, x_t)
        return (self.d_sigma(t) * x_t - self.sigma(t) * velocity) / self._wronskian(t)

    def velocity_to_noise(self, velocity: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The noise behind `velocity` at `x_t`: eps = (alpha v - d_alpha x_t) / (alpha d_sigma - d_alpha sigma)."""
        t = expand_time(t, x_t)
        return (self.alpha(t) * velocity - self.d_alpha(t) * x_t) / self._wronskian(t)

    def velocity_to_score(self, velocity: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The score grad log p_t(x_t) = -eps / sigma(t); infinite at t = 0."""
        return -self.velocity_to_noise(velocity, x_t, t) / self.sigma(expand_time(t, x_t))

    def score_to_velocity(self, score: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The inverse of `velocity_to_score`; undefined at t = 1, where alpha is 0."""
        t = expand_time(t, x_t)
        return (self.d_alpha(t) * x_t - self._wronskian(t) * self.sigma(t) * score) / self.alpha(t)

    def _wronskian(self, t: torch.Tensor) -> torch.Tensor:
        # Positive everywhere on both paths: 1 on the linear, pi / 2 on the cosine path.
        return self.alpha(t) * self.d_sigma(t) - self.d_alpha(t) * self.sigma(t)


class LinearInterpolant(Interpolant):
    """alpha = 1 - t, sigma = t, v = eps - x_0 (paper Table 8)."""

    name = "linear"

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t)

    def time_of_noise_ratio(self, ratio: torch.Tensor) -> torch.Tensor:
        return ratio / (1 + ratio)


class CosineInterpolant(Interpolant):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): SiT's generalised variance-preserving path with time reversed."""

    name = "cosine"

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(t * (math.pi / 2))

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return -(math.pi / 2) * torch.sin(t * (math.pi / 2))

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return (math.pi / 2) * torch.cos(t * (math.pi / 2))

    def time_of_noise_ratio(self, ratio: torch.Tensor) -> torch.Tensor:
        return (2 / math.pi) * torch.atan(ratio)


_INTERPOLANTS: dict[str, type[Interpolant]] = {path.name: path for path in (LinearInterpolant, CosineInterpolant)}


def get_interpolant(path: str) -> Interpolant:
    """The interpolant of a path, `"linear"` or `"cosine"`; a `ConfigurationError` for any other."""
    if path not in _INTERPOLANTS:
        raise ConfigurationError(f"there is no path {path!r}, {close_matches(path, _INTERPOLANTS)} (option `path`).")
    return _INTERPOLANTS[path]()


def timesteps_from_uniform(
    uniform: torch.Tensor,
    interpolant: Interpolant,
    timestep_sampling: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
) -> torch.Tensor:
    """Training times t in [0, 1] made from uniform draws, one each.

    Args:
        uniform (`torch.Tensor`): draws in [0, 1), shape `(B,)`; float64 keeps the tails of the log-normal.
        interpolant (`Interpolant`): the path; it turns a noise-to-data ratio into a time.
        timestep_sampling (`str`): `"uniform"` returns the draws; `"lognormal"` makes sigma / alpha =
            exp(mean + std n) with n ~ N(0, 1), which on the linear path is t = sigmoid(mean + std n).
    """
    if timestep_sampling == "uniform":
        return uniform
    if timestep_sampling == "lognormal":
        # The inverse distribution function is infinite at 0 and 1, which the draws may touch after rounding.
        tiny = torch.finfo(uniform.dtype).eps / 2
        normal = torch.special.ndtri(uniform.clamp(tiny, 1 - tiny))
        return interpolant.time_of_noise_ratio(torch.exp(mean + std * normal))
    raise ConfigurationError(
        f"there is no timestep sampling {timestep_sampling!r}, {close_matches(timestep_sampling, TIMESTEP_SAMPLINGS)} "
        "(option `timestep_sampling`)."
    )
