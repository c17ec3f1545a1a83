"""The Euler-Maruyama sampler of SiT and REPA as a diffusers scheduler.

The file imports nothing from its package, so that a Hub repository can carry it as code.
"""

from __future__ import annotations

import math
import numbers

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


PATH_TYPES = ("linear", "cosine")


class FlowMatchEulerMaruyamaScheduler(SchedulerMixin, ConfigMixin):
    """
    Euler-Maruyama integration of the reverse SDE of a velocity model, from noise (t = 1) to data (t = 0).

    On the path `x_t = alpha(t) x_0 + sigma(t) eps` one step from t to t' < t is

        x <- x + (v - w(t) / 2 * score) (t' - t) + sqrt(w(t) (t - t')) eps,    w(t) = diffusion_scale * t

    (SiT, Eq. 6; REPA's `euler_maruyama_sampler`, where `diffusion_scale` is 2). The grid is `num_inference_steps` even
    points from 1 to `last_step_size`, then 0; the last step has the same drift and no noise. It calls the model once
    per step. Classifier-free guidance of the velocity equals guidance of the drift, which is linear in it.

    The step is computed in float32, or in float64 if the sample is float64, and keeps the dtype of the sample. Noise
    is drawn in the dtype of the computation, so it does not depend on the precision of the model.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            The factor between `timesteps`, which are continuous, and the time t in [0, 1].
        path_type (`str`, defaults to `"linear"`):
            `"linear"` (alpha = 1 - t, sigma = t) or `"cosine"` (alpha = cos(pi t / 2), sigma = sin(pi t / 2)): the
            path on which the model was trained.
        diffusion_scale (`float`, defaults to 2.0):
            The factor of t in the squared diffusion w(t); 0 turns the noise off.
        last_step_size (`float`, defaults to 0.04):
            The size of the last step, in (0, 1).

    Raises:
        ValueError: an argument is outside its range.
    """

    _compatibles: list[str] = []
    order = 1

    timesteps: torch.Tensor
    sigmas: torch.Tensor
    _step_index: int | None
    _begin_index: int | None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path_type: str = "linear",
        diffusion_scale: float = 2.0,
        last_step_size: float = 0.04,
    ):
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` is {num_train_timesteps}, but must be at least 1.")
        if path_type not in PATH_TYPES:
            raise ValueError(f"`path_type` is {path_type!r}, but must be one of {', '.join(map(repr, PATH_TYPES))}.")
        if not (math.isfinite(diffusion_scale) and diffusion_scale >= 0):
            raise ValueError(f"`diffusion_scale` is {diffusion_scale}, but must be a finite number of at least 0.")
        if not 0 < last_step_size < 1:
            raise ValueError(f"`last_step_size` is {last_step_size}, but must lie between 0 and 1.")

        # Before `set_timesteps` the scheduler holds the training grid, as diffusers' flow schedulers do. The name
        # `sigmas` is theirs too: it is the time t, which equals the noise level on the linear path only.
        self._set_grid(torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64) / num_train_timesteps)
        self.num_inference_steps: int | None = None

    @property
    def step_index(self) -> int | None:
        """How many steps of the grid are done; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index at which sampling begins, if a pipeline has set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index into `timesteps` of the first step, so that `step` need not search for its timestep."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Sets the grid of times: `linspace(1, last_step_size, num_inference_steps)` and 0.

        `timesteps` are float32 on `device`, one for each call of the model; `sigmas` are one longer and stay on the
        CPU in float64, so that a step never waits for the device.

        Args:
            num_inference_steps (`int`): the number of steps, at least 2.
            device (`str` or `torch.device`, *optional*): where `timesteps` are needed.

        Raises:
            ValueError: `num_inference_steps` is not an integer of at least 2.
        """
        is_integer = isinstance(num_inference_steps, numbers.Integral) and not isinstance(num_inference_steps, bool)
        if not is_integer or num_inference_steps < 2:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps!r}, but the Euler-Maruyama grid needs an integer of "
                "at least 2: noisy steps and one last step without noise."
            )
        times = torch.linspace(1.0, self.config.last_step_size, num_inference_steps, dtype=torch.float64)
        self._set_grid(torch.cat([times, times.new_zeros(1)]))
        self.timesteps = self.timesteps[:-1].to(device)
        self.num_inference_steps = num_inference_steps

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """The index of `timestep` in `timesteps`, or in another grid; a `ValueError` if it is not there."""
        grid = self.timesteps if schedule_timesteps is None else schedule_timesteps
        indices = (grid == (timestep.to(grid.device) if isinstance(timestep, torch.Tensor) else timestep)).nonzero()
        if len(indices) == 0:
            raise ValueError(
                f"The timestep {float(timestep)} is not in the grid of {len(grid)} timesteps: pass one of "
                "`scheduler.timesteps`."
            )
        return int(indices[0])

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        The point x_t = alpha(t) x_0 + sigma(t) eps of the path.

        Args:
            sample (`torch.Tensor`): the data x_0, shape `(B, ...)`.
            timestep (`float` or `torch.Tensor`): any times in [0, `num_train_timesteps`], a number or shape `(B,)`.
            noise (`torch.Tensor`): standard normal noise of the shape of `sample`.

        Returns:
            `torch.Tensor`: shape and dtype of `sample`.
        """
        dtype = _compute_dtype(sample)
        t = torch.as_tensor(timestep, device=sample.device).to(dtype) / self.config.num_train_timesteps
        t = t.reshape(-1, *[1] * (sample.ndim - 1))
        if self.config.path_type == "linear":
            alpha, sigma = 1 - t, t
        else:
            alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        return (alpha * sample.to(dtype) + sigma * noise.to(dtype)).to(sample.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """
        One step towards the data.

        Args:
            model_output (`torch.Tensor`): the velocity at `sample`, shape `(B, ...)`.
            timestep (`float` or `torch.Tensor`): the current one of `timesteps`.
            sample (`torch.Tensor`): the state x_t, shape of `model_output`.
            generator (`torch.Generator` or a list of one for each sample, *optional*): the source of the noise.
            variance_noise (`torch.Tensor`, *optional*): standard normal noise to use instead of drawing it.
            return_dict (`bool`, defaults to `True`): whether to return an output object instead of a tuple.

        Returns:
            [`SchedulerOutput`] or `tuple`: the sample at the next, smaller time; shape, dtype and device of `sample`.

        Raises:
            ValueError: `set_timesteps` was not called, every step is done, or `timestep` is an integer index.
        """
        index = self._current_index(timestep)
        t, next_t = self.sigmas[index].item(), self.sigmas[index + 1].item()
        dtype = _compute_dtype(sample)
        state = sample.to(dtype)

        prev_sample = state + self._drift(model_output.to(dtype), state, t) * (next_t - t)
        if next_t > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
            diffusion = self.config.diffusion_scale * t
            prev_sample = prev_sample + math.sqrt(diffusion * (t - next_t)) * variance_noise.to(dtype)

        self._step_index = index + 1
        prev_sample = prev_sample.to(sample.dtype)
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _set_grid(self, times: torch.Tensor) -> None:
        self.sigmas = times
        self.timesteps = (times * self.config.num_train_timesteps).to(torch.float32)
        self._step_index = None
        self._begin_index = None

    def _current_index(self, timestep: float | torch.Tensor) -> int:
        if self.num_inference_steps is None:
            raise ValueError("The scheduler has no grid of times yet: call `set_timesteps` before `step`.")
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(
                f"`timestep` is the integer {int(timestep)}, but `step` expects one of `scheduler.timesteps`, which "
                "are floating point numbers."
            )
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= self.num_inference_steps:
            raise ValueError(
                f"All {self.num_inference_steps} steps of the scheduler are done: call `set_timesteps` to begin again."
            )
        return self._step_index

    def _drift(self, velocity: torch.Tensor, sample: torch.Tensor, t: float) -> torch.Tensor:
        """v - w / 2 * score with score = -eps / sigma, eps being the noise behind the velocity at x_t."""
        if self.config.path_type == "linear":
            sigma, noise = t, (1 - t) * velocity + sample
        else:
            alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
            noise = sigma * sample + (2 / math.pi) * alpha * velocity
        return velocity + (self.config.diffusion_scale * t / (2 * sigma)) * noise


def _compute_dtype(sample: torch.Tensor) -> torch.dtype:
    return torch.float64 if sample.dtype == torch.float64 else torch.float32
