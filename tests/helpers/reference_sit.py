"""A plain SiT, written out from the description of the official models, that runs their state dicts as they are.

Nothing of the package is used, so that converted weights can be compared with what the official code would compute.
Everything runs in the dtype of the weights, sinusoids included.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


State = dict[str, torch.Tensor]


def reference_forward(
    state: State,
    x: torch.Tensor,
    t: torch.Tensor,
    y: torch.Tensor,
    heads: int,
    class_token: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """Velocity of the latents `(B, C, H, W)`, that of REG's class token, and the tokens after each block.

    `t` is in [0, 1] in the model's own direction. A sigma in the final layer is dropped.
    """
    patch = state["x_embedder.proj.weight"].shape[-1]
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    tokens = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    tokens = tokens.flatten(2).transpose(1, 2)
    if class_token is not None:
        first = F.linear(class_token, state["cls_projectors2.weight"], state["cls_projectors2.bias"])
        first = F.layer_norm(first, first.shape[-1:], state["wg_norm.weight"], state["wg_norm.bias"], eps=1e-6)
        tokens = torch.cat([first[:, None], tokens], dim=1)
    tokens = tokens + state["pos_embed"]
    condition = time_embedding(state, t) + state["y_embedder.embedding_table.weight"][y]

    hidden_states = []
    block = 0
    while f"blocks.{block}.attn.qkv.weight" in state:
        tokens = _block(state, f"blocks.{block}.", tokens, condition, heads)
        hidden_states.append(tokens)
        block += 1

    shift, scale = _linear(state, "final_layer.adaLN_modulation.1", F.silu(condition)).chunk(2, dim=1)
    tokens = _modulate(tokens, shift, scale)
    token_velocity = None
    if class_token is not None:
        token_velocity = _linear(state, "final_layer.linear_cls", tokens[:, 0])
        tokens = tokens[:, 1:]
    tokens = _linear(state, "final_layer.linear", tokens)
    channels = tokens.shape[-1] // patch**2
    image = tokens.reshape(len(x), rows, columns, patch, patch, channels)
    image = torch.einsum("nhwpqc->nchpwq", image).reshape(len(x), channels, rows * patch, columns * patch)
    return image[:, : x.shape[1]], token_velocity, hidden_states


def time_embedding(state: State, t: torch.Tensor) -> torch.Tensor:
    """Embedding `(B, D)` of times `(B,)`."""
    weight = state["t_embedder.mlp.0.weight"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=weight.dtype) / 128)
    angles = t.to(weight.dtype)[:, None] * frequencies
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    return _linear(state, "t_embedder.mlp.2", F.silu(_linear(state, "t_embedder.mlp.0", embedding)))


def reference_projection(state: State, number: int, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens `(B, N, D)` through a projector of REPA or iREPA, under official names."""
    prefix = f"projectors.{number}."
    if f"{prefix}projection_layer.weight" in state:
        weight, bias = state[f"{prefix}projection_layer.weight"], state[f"{prefix}projection_layer.bias"]
        if weight.ndim == 2:
            return F.linear(tokens, weight, bias)
        image = tokens.transpose(1, 2).unflatten(2, grid)
        return F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2).flatten(2).transpose(1, 2)
    if f"{prefix}projection_layer.0.weight" in state:
        prefix += "projection_layer."
    tokens = F.silu(_linear(state, f"{prefix}0", tokens))
    tokens = F.silu(_linear(state, f"{prefix}2", tokens))
    return _linear(state, f"{prefix}4", tokens)


def _block(state: State, prefix: str, x: torch.Tensor, condition: torch.Tensor, heads: int) -> torch.Tensor:
    modulation = _linear(state, f"{prefix}adaLN_modulation.1", F.silu(condition)).chunk(6, dim=1)
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation
    attended = _attention(state, f"{prefix}attn.", _modulate(x, shift_attention, scale_attention), heads)
    x = x + gate_attention[:, None] * attended
    hidden = _linear(state, f"{prefix}mlp.fc1", _modulate(x, shift_mlp, scale_mlp))
    return x + gate_mlp[:, None] * _linear(state, f"{prefix}mlp.fc2", F.gelu(hidden, approximate="tanh"))


def _attention(state: State, prefix: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    batch, length, dim = x.shape
    qkv = _linear(state, f"{prefix}qkv", x).reshape(batch, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    query, key, value = qkv[0], qkv[1], qkv[2]
    if f"{prefix}q_norm.weight" in state:
        width = query.shape[-1:]
        query = F.layer_norm(query, width, state[f"{prefix}q_norm.weight"], state[f"{prefix}q_norm.bias"])
        key = F.layer_norm(key, width, state[f"{prefix}k_norm.weight"], state[f"{prefix}k_norm.bias"])
    scores = (query @ key.transpose(-2, -1)) * (dim // heads) ** -0.5
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, dim)
    return _linear(state, f"{prefix}proj", mixed)


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def random_state(
    *,
    dim: int = 32,
    depth: int = 2,
    patch: int = 2,
    channels: int = 4,
    grid: tuple[int, int] = (4, 4),
    rows: int = 11,
    sigma: bool = False,
    head_dim: int | None = None,
    class_token_dim: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> State:
    """An official state dict with random weights everywhere, without projectors.

    `rows` are those of the label table, `sigma` doubles the final layer as SiT's `learn_sigma` does, `head_dim` adds
    the norms of queries and keys, `class_token_dim` makes it a REG.
    """
    prefix_tokens = 0 if class_token_dim is None else 1
    linears = {
        "t_embedder.mlp.0": (dim, 256),
        "t_embedder.mlp.2": (dim, dim),
        "final_layer.linear": (patch**2 * channels * (2 if sigma else 1), dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
    }
    norms = []
    for block in range(depth):
        for name, shape in (
            ("attn.qkv", (3 * dim, dim)),
            ("attn.proj", (dim, dim)),
            ("mlp.fc1", (4 * dim, dim)),
            ("mlp.fc2", (dim, 4 * dim)),
            ("adaLN_modulation.1", (6 * dim, dim)),
        ):
            linears[f"blocks.{block}.{name}"] = shape
        norms += [(f"blocks.{block}.attn.{name}", head_dim) for name in ("q_norm", "k_norm") if head_dim is not None]
    if class_token_dim is not None:
        linears |= {"cls_projectors2": (dim, class_token_dim), "final_layer.linear_cls": (class_token_dim, dim)}
        norms.append(("wg_norm", dim))
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, prefix_tokens + grid[0] * grid[1], dim),
        "x_embedder.proj.weight": (dim, channels, patch, patch),
        "x_embedder.proj.bias": (dim,),
        "y_embedder.embedding_table.weight": (rows, dim),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in norms:
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    generator = None if device == "meta" else torch.Generator().manual_seed(seed)
    state = {
        name: 0.2 * torch.randn(shape, generator=generator, dtype=dtype, device=device)
        for name, shape in shapes.items()
    }
    if prefix_tokens:
        state["pos_embed"][:, 0] = 0
    return state


def random_projector(kind: str, number: int = 0, *, dim: int = 32, hidden: int = 24, out: int = 16) -> State:
    """A projector with random weights: "mlp" (REPA's names), "irepa-mlp", "linear", "conv1" or "conv3"."""
    if kind.endswith("mlp"):
        wrapper = "projection_layer." if kind == "irepa-mlp" else ""
        layers = {f"{wrapper}0": (hidden, dim), f"{wrapper}2": (hidden, hidden), f"{wrapper}4": (out, hidden)}
    elif kind == "linear":
        layers = {"projection_layer": (out, dim)}
    else:
        layers = {"projection_layer": (out, dim, int(kind[-1]), int(kind[-1]))}
    generator = torch.Generator().manual_seed(100 + number)
    state = {}
    for name, shape in layers.items():
        for parameter, size in (("weight", shape), ("bias", shape[:1])):
            value = 0.2 * torch.randn(size, generator=generator, dtype=torch.float64)
            state[f"projectors.{number}.{name}.{parameter}"] = value
    return state
