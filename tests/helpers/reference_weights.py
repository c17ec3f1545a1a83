"""Deterministic weights of the official SiT, REPA and REG code at a tiny size, and their way into our model.

The official models were run once with these weights; their outputs are the golden values of the tests. A weight is a
function of its name in the OFFICIAL state dict, so the dictionaries below carry official names:

    w.flat[i] = 0.1 * sin(0.37 * S + 0.11 * i),    S = sum of the character codes of the name

Usage::

    model = golden_model("repa")                                           # SiTTransformer2DModel, float64, eval mode
    velocity = model(**golden_inputs()).sample
    weights = without_prefix(projector_state_dict("mlp"), "projectors.0.")  # keys "0.weight", "0.bias", "2.weight"...
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel


Kind = Literal["repa", "sit", "reg"]

LATENT_SIZE = 8
PATCH_SIZE = 2
CHANNELS = 4
DIM = 32
DEPTH = 3
HEADS = 4
NUM_CLASSES = 10
PROJECTOR_DIM = 24
TEACHER_DIM = 16
GRID = (LATENT_SIZE // PATCH_SIZE, LATENT_SIZE // PATCH_SIZE)
TAP = "transformer_blocks.1"
"""The block whose output the golden projections use: depth 2, counted from one."""

GOLDEN_CONFIG: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "patch_size": PATCH_SIZE,
    "in_channels": CHANNELS,
    "num_layers": DEPTH,
    "num_attention_heads": HEADS,
    "attention_head_dim": DIM // HEADS,
    "num_classes": NUM_CLASSES,
}


def fill(shape: tuple[int, ...], key: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The golden weight of `shape` for the parameter that the official code calls `key`."""
    offset = 0.37 * sum(ord(character) for character in key)
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.1 * torch.sin(offset + 0.11 * index)).reshape(shape).to(dtype)


def reference_pos_embed(rows: int, columns: int, dim: int) -> torch.Tensor:
    """The official position table, one entry at a time: `(1, rows * columns, dim)`, float64 rounded to float32."""
    quarter = dim // 4
    table = []
    for row in range(rows):
        for column in range(columns):
            embedding: list[float] = []
            for position in (column, row):
                angles = [position * 10000 ** (-k / quarter) for k in range(quarter)]
                embedding += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            table.append(embedding)
    return torch.tensor([table], dtype=torch.float64).float()


def reference_shapes(kind: Kind) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official state dict, without `pos_embed` and projectors."""
    hidden, patch_values = 4 * DIM, PATCH_SIZE * PATCH_SIZE * CHANNELS
    shapes = {
        "x_embedder.proj.weight": (DIM, CHANNELS, PATCH_SIZE, PATCH_SIZE),
        "x_embedder.proj.bias": (DIM,),
        "t_embedder.mlp.0.weight": (DIM, 256),
        "t_embedder.mlp.0.bias": (DIM,),
        "t_embedder.mlp.2.weight": (DIM, DIM),
        "t_embedder.mlp.2.bias": (DIM,),
        "y_embedder.embedding_table.weight": (NUM_CLASSES + 1, DIM),
    }
    linears = {f"final_layer.{name}": size for name, size in final_layer_linears(kind, patch_values).items()}
    for block in range(DEPTH):
        linears |= {
            f"blocks.{block}.attn.qkv": (3 * DIM, DIM),
            f"blocks.{block}.attn.proj": (DIM, DIM),
            f"blocks.{block}.mlp.fc1": (hidden, DIM),
            f"blocks.{block}.mlp.fc2": (DIM, hidden),
            f"blocks.{block}.adaLN_modulation.1": (6 * DIM, DIM),
        }
    if kind == "reg":
        linears["cls_projectors2"] = (DIM, TEACHER_DIM)
        shapes |= {"wg_norm.weight": (DIM,), "wg_norm.bias": (DIM,)}
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def final_layer_linears(kind: Kind, patch_values: int) -> dict[str, tuple[int, int]]:
    """Linear layers of the official final layer: SiT also predicts a sigma that it drops, REG a class token."""
    rows = 2 * patch_values if kind == "sit" else patch_values
    linears = {"linear": (rows, DIM), "adaLN_modulation.1": (2 * DIM, DIM)}
    return linears | ({"linear_cls": (TEACHER_DIM, DIM)} if kind == "reg" else {})


def reference_state_dict(kind: Kind, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The golden state dict under official names; REG's position table has a zero row for its class token."""
    state = {name: fill(shape, name, dtype) for name, shape in reference_shapes(kind).items()}
    table = reference_pos_embed(*GRID, DIM)
    if kind == "reg":
        table = torch.cat([torch.zeros(1, 1, DIM), table], dim=1)
    state["pos_embed"] = table.to(dtype)
    return state


def projector_state_dict(kind: Literal["mlp", "conv"], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Golden projector weights under official names.

    `"mlp"` is REPA's `projectors.0.{0,2,4}` (Linear 32-24, SiLU, Linear 24-24, SiLU, Linear 24-16), `"conv"` iREPA's
    `projectors.0.projection_layer` (Conv2d 32-16, kernel 3, padding 1).
    """
    if kind == "conv":
        shapes = {"projection_layer": (TEACHER_DIM, DIM, 3, 3)}
    else:
        shapes = {"0": (PROJECTOR_DIM, DIM), "2": (PROJECTOR_DIM, PROJECTOR_DIM), "4": (TEACHER_DIM, PROJECTOR_DIM)}
    state = {}
    for name, shape in shapes.items():
        for suffix, size in (("weight", shape), ("bias", shape[:1])):
            key = f"projectors.0.{name}.{suffix}"
            state[key] = fill(size, key, dtype)
    return state


def without_prefix(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


TOP_LEVEL_NAMES = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "label_embed",
    "cls_projectors2": "class_token_embed",
    "wg_norm": "class_token_norm",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "proj_out",
    "final_layer.linear_cls": "class_token_proj_out",
}
BLOCK_NAMES = {
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "modulation",
}


def to_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An official state dict (no projectors, no `ema` level, any size) under the names of `SiTTransformer2DModel`.

    Only names change, the fused qkv rows are split, and the zero position row of REG is dropped: weights keep the time
    direction and the output channels they were trained with.
    """
    converted = {}
    for key, value in state.items():
        name, _, suffix = key.rpartition(".")
        if key == "pos_embed":
            first_patch = 1 if "wg_norm.weight" in state else 0
            converted[key] = value[:, first_patch:]
        elif name in TOP_LEVEL_NAMES:
            converted[f"{TOP_LEVEL_NAMES[name]}.{suffix}"] = value
        else:
            _, block, layer = name.split(".", 2)
            prefix = f"transformer_blocks.{block}"
            if layer == "attn.qkv":
                for projection, rows in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True):
                    converted[f"{prefix}.attn.{projection}.{suffix}"] = rows
            else:
                converted[f"{prefix}.{BLOCK_NAMES[layer]}.{suffix}"] = value
    return converted


def golden_model(kind: Kind = "repa", dtype: torch.dtype = torch.float64) -> SiTTransformer2DModel:
    """Our model with the golden weights, in eval mode.

    `"sit"` keeps the sigma channels (`out_channels=8`): the official velocity is `sample[:, :4]`, in SiT's own time
    direction (0 = noise, 1 = data).
    """
    extra = {"sit": {"out_channels": 2 * CHANNELS}, "reg": {"class_token_dim": TEACHER_DIM}}.get(kind, {})
    model = SiTTransformer2DModel(**GOLDEN_CONFIG, **extra).to(dtype)
    model.load_state_dict(to_diffusers(reference_state_dict(kind, dtype)))
    return model.eval()


def golden_inputs(dtype: torch.dtype = torch.float64, class_token: bool = False) -> dict[str, torch.Tensor]:
    """Keyword arguments of one golden forward: two latents, t = 0.25 and 0.8 (times 1000), labels 3 and 10 (null)."""
    inputs = {
        "hidden_states": torch.sin(0.05 * torch.arange(2 * CHANNELS * LATENT_SIZE**2, dtype=torch.float64))
        .reshape(2, CHANNELS, LATENT_SIZE, LATENT_SIZE)
        .to(dtype),
        "timestep": torch.tensor([250.0, 800.0]),
        "class_labels": torch.tensor([3, NUM_CLASSES]),
    }
    if class_token:
        token = torch.cos(0.3 * torch.arange(2 * TEACHER_DIM, dtype=torch.float64))
        inputs["class_token"] = token.reshape(2, TEACHER_DIM).to(dtype)
    return inputs
