"""REPA's weights, and those brought to its convention, as a state dict of `SiTTransformer2DModel`, and back.

Both run from data (t = 0) to noise (t = 1), so names change and no number does: the fused rows [q | k | v] are three
layers here, and the position table is a buffer whose stored values are kept. An average of the weights moves even that
table, by up to 1.6e-4, so it must not be computed anew.
"""

from __future__ import annotations

import torch

from diffusers_srepa.conversion.names import (
    BLOCK,
    CLASS_TOKEN,
    POSITIONS,
    QK_NORM,
    QKV,
    TOP_LEVEL,
    to_diffusers_name,
)
from diffusers_srepa.conversion.reg import add_class_position, drop_class_position
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel


def to_diffusers(
    state: dict[str, torch.Tensor], has_class_token: bool, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Names of `SiTTransformer2DModel` for a backbone under official names.

    Args:
        state (`dict[str, torch.Tensor]`): a complete backbone without projectors; it is emptied tensor by tensor, so
            that a large model is never in memory twice.
        has_class_token (`bool`): whether its table of positions has a row for REG's class token.
        dtype (`torch.dtype`, *optional*): precision of the result, by default that of each tensor.
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
            value = drop_class_position(value)
        converted[to_diffusers_name(name)] = value.contiguous()
    return converted


def to_official(transformer: SiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """The official state dict of REPA (of REG for a model with a class token), the inverse of [`to_diffusers`]."""
    state = {name: value.detach().cpu() for name, value in transformer.state_dict().items()}
    config = transformer.config
    positions = state.pop(POSITIONS)
    official = {POSITIONS: add_class_position(positions) if config.class_token_dim is not None else positions}
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
