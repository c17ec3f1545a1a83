"""Weights under official names as a state dict of `SiTTransformer2DModel`, and back.

REPA, iREPA and REG run from data (t = 0) to noise (t = 1) like this package, so names change and no number does: the
fused rows [q | k | v] are three layers here, and the position table is a buffer whose stored values are kept. An
average of the weights moves even that table, by up to 1.6e-4, so it must not be computed anew. REG's table has a first
row for its class token, always zero, which the model here lacks.

SiT runs from noise (t = 0) to data (t = 1) and predicts data - noise, so that v_repa(x, t, y) = -v_sit(x, 1 - t, y).
For velocity models on the linear and the GVP (cosine) path this is a change of three weights, exact but for rounding:

- the sinusoid of 1 - t is a linear map of that of t. With frequencies f_i = 10000^(-i / 128) and the first matrix of
  the time MLP, W = [W_cos | W_sin], columnwise

      W_cos' = W_cos cos f + W_sin sin f,    W_sin' = W_cos sin f - W_sin cos f,

  a reflection, which undoes itself;
- the rows of the final layer change their sign, and those that predict the sigma go.
"""

from __future__ import annotations

import math

import torch

from diffusers_srepa.conversion.names import (
    BLOCK,
    CLASS_TOKEN,
    FINAL_LAYER,
    FREQUENCIES,
    POSITIONS,
    QK_NORM,
    QKV,
    TIME_WEIGHT,
    TOP_LEVEL,
    to_diffusers_name,
)
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel


def to_diffusers(
    state: dict[str, torch.Tensor], has_class_token: bool, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Names of `SiTTransformer2DModel` for a complete backbone under official names, without projectors.

    `state` is emptied tensor by tensor, so that a large model is never in memory twice. With `has_class_token` its
    table of positions has a row for REG's class token; `dtype` is by default that of each tensor.
    """
    converted: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name in list(state):
        value = state.pop(name)
        value = value if dtype is None else value.to(dtype)
        # safetensors refuses tensors that share memory, which those of a PyTorch file may.
        storage = value.untyped_storage().data_ptr()
        value = value.clone() if storage in storages else value
        storages.add(storage)
        module, _, parameter = name.rpartition(".")
        if module.endswith(".attn.qkv"):
            prefix = f"transformer_blocks.{module.split('.')[1]}.attn"
            for projection, rows in zip(QKV, value.chunk(3), strict=True):
                converted[f"{prefix}.{projection}.{parameter}"] = rows.clone()
            continue
        if name == POSITIONS and has_class_token:
            value = value[:, 1:]
        converted[to_diffusers_name(name)] = value.contiguous()
    return converted


def to_official(transformer: SiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """The official state dict of REPA (of REG for a model with a class token), the inverse of [`to_diffusers`]."""
    state = {name: value.detach().cpu() for name, value in transformer.state_dict().items()}
    config = transformer.config
    positions = state.pop(POSITIONS)
    if config.class_token_dim is not None:
        positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    official = {POSITIONS: positions}
    for old, new in (TOP_LEVEL | CLASS_TOKEN).items():
        _move(state, official, new, old)
    for block in range(config.num_layers):
        ours, theirs = f"transformer_blocks.{block}", f"blocks.{block}"
        for parameter in ("weight", "bias"):
            rows = [state.pop(f"{ours}.attn.{projection}.{parameter}") for projection in QKV]
            official[f"{theirs}.attn.qkv.{parameter}"] = torch.cat(rows)
        for old, new in (BLOCK | QK_NORM).items():
            _move(state, official, f"{ours}.{new}", f"{theirs}.{old}")
    if state:
        raise ValueError(f"the transformer has weights that REPA's does not: {', '.join(sorted(state))}.")
    return official


def _move(state: dict[str, torch.Tensor], target: dict[str, torch.Tensor], old: str, new: str) -> None:
    for parameter in ("weight", "bias"):
        if f"{old}.{parameter}" in state:
            target[f"{new}.{parameter}"] = state.pop(f"{old}.{parameter}")


def to_repa_convention(state: dict[str, torch.Tensor], channels: int, final_channels: int) -> None:
    """Change the three weights of a SiT state dict, under official names; the tensors themselves are left as they are.

    `channels` are those of the latents, `final_channels` those of the final layer: twice as many with a sigma.
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
