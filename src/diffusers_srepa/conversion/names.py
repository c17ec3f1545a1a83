"""Official names and shapes of SiT, REPA, iREPA and REG, and their counterparts in `SiTTransformer2DModel`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from diffusers_srepa.conversion.read import name_some
from diffusers_srepa.errors import ConfigurationError


POSITIONS = "pos_embed"
TIME_WEIGHT = "t_embedder.mlp.0.weight"
FINAL_LAYER = "final_layer.linear"
FREQUENCIES = 256
QKV = ("to_q", "to_k", "to_v")

TOP_LEVEL = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "label_embed",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "proj_out",
}
CLASS_TOKEN = {
    "cls_projectors2": "class_token_embed",
    "wg_norm": "class_token_norm",
    "final_layer.linear_cls": "class_token_proj_out",
}
BLOCK = {
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "modulation",
}
QK_NORM = {"attn.q_norm": "attn.norm_q", "attn.k_norm": "attn.norm_k"}

_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)")
_LEGACY_NAME = re.compile(r"decoder_blocks\.(\d+)\.(.+)")


def rename_legacy_blocks(state: dict[str, torch.Tensor]) -> int | None:
    """Turn REPA's old `decoder_blocks.{i}` into `blocks.{i + encoder_depth}`, in place.

    The depth of the alignment, `encoder_depth`, is the number of `blocks`; None if there are no such names.
    """
    legacy = {name: match for name in state if (match := _LEGACY_NAME.fullmatch(name))}
    encoder_depth = count_blocks(state)
    for name, match in legacy.items():
        state[f"blocks.{int(match[1]) + encoder_depth}.{match[2]}"] = state.pop(name)
    return encoder_depth if legacy else None


def count_blocks(names: Iterable[str]) -> int:
    """One more than the highest number of a block."""
    return max((int(match[1]) + 1 for name in names if (match := _BLOCK_NAME.fullmatch(name))), default=0)


def to_diffusers_name(name: str) -> str:
    """Our name of an official weight or bias; a fused `attn.qkv` has three of ours and is not taken."""
    module, _, parameter = name.rpartition(".")
    if name == POSITIONS:
        return name
    if module in TOP_LEVEL or module in CLASS_TOKEN:
        return f"{(TOP_LEVEL | CLASS_TOKEN)[module]}.{parameter}"
    _, number, layer = module.split(".", 2)
    return f"transformer_blocks.{number}.{(BLOCK | QK_NORM)[layer]}.{parameter}"


def expected_shapes(
    *,
    dim: int,
    num_layers: int,
    mlp_dim: int,
    patch_size: int,
    in_channels: int,
    final_rows: int,
    table_rows: int,
    num_positions: int,
    head_dim: int | None,
    class_token_dim: int | None,
) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a backbone; `head_dim` is that of `qk_norm`, None without it."""
    # Every layer has a bias as long as its weight.
    weights: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (dim, in_channels, patch_size, patch_size),
        "t_embedder.mlp.0": (dim, FREQUENCIES),
        "t_embedder.mlp.2": (dim, dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
        FINAL_LAYER: (final_rows, dim),
    }
    for block in range(num_layers):
        weights |= {
            f"blocks.{block}.attn.qkv": (3 * dim, dim),
            f"blocks.{block}.attn.proj": (dim, dim),
            f"blocks.{block}.mlp.fc1": (mlp_dim, dim),
            f"blocks.{block}.mlp.fc2": (dim, mlp_dim),
            f"blocks.{block}.adaLN_modulation.1": (6 * dim, dim),
        }
        if head_dim is not None:
            weights |= {f"blocks.{block}.{name}": (head_dim,) for name in QK_NORM}
    if class_token_dim is not None:
        weights |= {"cls_projectors2": (dim, class_token_dim), "final_layer.linear_cls": (class_token_dim, dim)}
        weights["wg_norm"] = (dim,)
    shapes = {POSITIONS: (1, num_positions, dim), "y_embedder.embedding_table.weight": (table_rows, dim)}
    for name, shape in weights.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def check_shapes(state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a backbone whose names are missing or unknown, or whose shapes do not fit together; they are named."""
    missing = set(shapes) - set(state)
    unknown = set(state) - set(shapes)
    if missing or unknown:
        parts = [
            f"{what} {name_some(names)}" for what, names in (("lacks", missing), ("has the unknown", unknown)) if names
        ]
        raise ConfigurationError(
            f"the checkpoint {' and '.join(parts)}: it is none of SiT, REPA, iREPA and REG, or not complete."
        )
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ConfigurationError(
                f"the tensor {name} has shape {tuple(state[name].shape)}, but the other tensors of the checkpoint "
                f"require {shape}: it mixes models of different sizes."
            )
