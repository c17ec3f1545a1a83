"""SiT's weights in REPA's convention: time reversed, velocity negated, sigma dropped.

SiT runs from noise (t = 0) to data (t = 1) and predicts data - noise; REPA, diffusers and this package run the other
way round, so that v_repa(x, t, y) = -v_sit(x, 1 - t, y). For velocity models on the linear and the GVP (cosine) path
this is a change of three weights, exact but for rounding:

- the sinusoid of 1 - t is a linear map of that of t. With frequencies f_i = 10000^(-i / 128) and the first matrix of
  the time MLP, W = [W_cos | W_sin], columnwise

      W_cos' = W_cos cos f + W_sin sin f,    W_sin' = W_cos sin f - W_sin cos f,

  a reflection, which undoes itself;
- the rows of the final layer change their sign, and those that predict the sigma go.
"""

from __future__ import annotations

import math

import torch

from diffusers_srepa.conversion.names import FINAL_LAYER, FREQUENCIES, TIME_WEIGHT


# SiT's own `forward_with_cfg` guides three channels of the four.
GUIDANCE_CHANNELS = 3


def to_repa_convention(state: dict[str, torch.Tensor], channels: int, final_channels: int) -> None:
    """Change the three weights of a SiT state dict, under official names and in place.

    Args:
        state (`dict[str, torch.Tensor]`): a SiT state dict; the tensors themselves are left as they are.
        channels (`int`): channels of the latents.
        final_channels (`int`): channels of the final layer, `2 * channels` if it predicts a sigma too.
    """
    state[TIME_WEIGHT] = reflect_time(state[TIME_WEIGHT])
    for kind in ("weight", "bias"):
        name = f"{FINAL_LAYER}.{kind}"
        state[name] = -velocity_rows(state[name], channels, final_channels)


def reflect_time(weight: torch.Tensor) -> torch.Tensor:
    """The matrix `(D, 256)` of the time MLP that gives at t what `weight` gives at 1 - t; twice gives `weight` again.

    Computed in float64, returned in the dtype of `weight`.
    """
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float64))
    cosine, sine = frequencies.cos(), frequencies.sin()
    of_cosine, of_sine = weight.double().split(half, dim=1)
    reflected = [of_cosine * cosine + of_sine * sine, of_cosine * sine - of_sine * cosine]
    return torch.cat(reflected, dim=1).to(weight.dtype)


def velocity_rows(value: torch.Tensor, channels: int, final_channels: int) -> torch.Tensor:
    """The rows of a final weight or bias that belong to the velocity; the channel is the fastest index of a row."""
    by_channel = value.unflatten(0, (-1, final_channels))
    return by_channel[:, :channels].flatten(0, 1)
