"""SiT, the scalable interpolant transformer (Ma et al. 2024, https://arxiv.org/abs/2401.08740), as a diffusers model.

Shapes, once for the whole file:

    B batch, C latent channels, H x W latent size, p patch size
    h, w = H / p, W / p     token grid, rows and columns
    N = h * w               patch tokens, row-major; REG puts one class token before them
    D                       width of a token = num_attention_heads * attention_head_dim

Time runs from data to noise: t = 0 is data, t = 1 is noise, x_t = alpha_t x_0 + sigma_t eps, and the model predicts
the velocity d x_t / d t (eps - x_0 on the linear path). `forward` takes diffusers timesteps, 1000 * t.

This file imports nothing from its package, so that a Hub repository can carry it next to the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import nn
from torch.nn import functional as F


_SIZES = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}

SIT_PRESETS: dict[str, dict[str, int]] = {
    f"SiT-{size}/{patch_size}": {**config, "patch_size": patch_size}
    for size, config in _SIZES.items()
    for patch_size in (2, 4, 8)
}
"""The sizes of the SiT paper by name, `"SiT-S/2"` to `"SiT-XL/8"`: keyword arguments of `SiTTransformer2DModel`."""


@dataclass
class SiTTransformer2DModelOutput(Transformer2DModelOutput):
    """Output of [`SiTTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, C_out, H, W)`): the velocity of the latents.
        class_token (`torch.Tensor` of shape `(B, class_token_dim)`, *optional*):
            the velocity of the class token, for a model with `class_token_dim`.
    """

    sample: torch.Tensor
    class_token: torch.Tensor | None = None


def sincos_position_table(
    rows: int, columns: int, dim: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Fixed positions of a token grid, shape `(1, rows * columns, dim)`, computed in `dtype`.

    With omega_k = 10000^(-4k / dim), the token at (row r, column c) gets
    `[sin(c omega), cos(c omega), sin(r omega), cos(r omega)]`: the column comes first. Coordinates are whole numbers
    at every resolution, so a smaller grid is the upper left corner of a larger one.
    """
    quarter = dim // 4
    omega = torch.exp(-math.log(10000.0) / quarter * torch.arange(quarter, device=device, dtype=dtype))
    row_angles = torch.arange(rows, device=device, dtype=dtype)[:, None] * omega
    column_angles = torch.arange(columns, device=device, dtype=dtype)[:, None] * omega
    row_part = torch.cat([row_angles.sin(), row_angles.cos()], dim=-1)[:, None].expand(-1, columns, -1)
    column_part = torch.cat([column_angles.sin(), column_angles.cos()], dim=-1)[None].expand(rows, -1, -1)
    return torch.cat([column_part, row_part], dim=-1).reshape(1, rows * columns, dim)


class SiTPatchEmbed(nn.Module):
    """Latents `(B, C, H, W)` to tokens `(B, N, D)`: a convolution over patches that do not overlap."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.proj(hidden_states).flatten(2).transpose(1, 2)


class SiTTimestepEmbedding(nn.Module):
    """Times `(B,)` in [0, 1], float32, to embeddings `(B, D)`: 128 cosines, 128 sines, then a two-layer MLP.

    bfloat16 would move a time by up to 2e-3, so the sinusoid is computed in float32 and only then cast to `dtype`.
    """

    frequency_dim = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(self.frequency_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, time: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        half = self.frequency_dim // 2
        exponents = torch.arange(half, device=time.device, dtype=torch.float32) / half
        angles = time[:, None] * torch.exp(-math.log(10000.0) * exponents)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class SiTAttnProcessor:
    """Self-attention through diffusers' attention dispatcher, so that every attention backend applies."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: SiTAttention, hidden_states: torch.Tensor) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)

        # (B, N, D) -> (B, N, heads, head_dim)
        query = query.unflatten(-1, (-1, attn.head_dim))
        key = key.unflatten(-1, (-1, attn.head_dim))
        value = value.unflatten(-1, (-1, attn.head_dim))

        # Under autocast a layer norm returns float32, but queries, keys and values must share a dtype.
        query = attn.norm_q(query).to(value.dtype)
        key = attn.norm_k(key).to(value.dtype)

        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3)
        hidden_states = attn.to_out[0](hidden_states)
        return attn.to_out[1](hidden_states)


class SiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention over tokens `(B, N, D)`, with biases.

    Args:
        dim (`int`): D, equal to `heads * head_dim`.
        heads (`int`): number of heads.
        head_dim (`int`): width of a head.
        qk_norm (`bool`): whether queries and keys pass through a layer norm over `head_dim`.
        processor (`SiTAttnProcessor`, *optional*): the attention itself.
    """

    _default_processor_cls = SiTAttnProcessor
    _available_processors = [SiTAttnProcessor]

    to_qkv: nn.Linear  # exists between `fuse_qkv_projections` and `unfuse_qkv_projections`

    def __init__(
        self, dim: int, heads: int, head_dim: int, qk_norm: bool = False, processor: SiTAttnProcessor | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.use_bias = True
        self.is_cross_attention = False

        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        # 1e-5 is the epsilon that REPA's qk_norm got from timm; it does not follow the model's `norm_eps`.
        self.norm_q = nn.LayerNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

        self.processor = self._default_processor_cls() if processor is None else processor

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.processor(self, hidden_states, **kwargs)


class SiTTransformerBlock(nn.Module):
    """Attention and MLP, each modulated by the conditioning (adaLN-Zero of Peebles & Xie 2023).

    `hidden_states` are tokens `(B, N, D)`, `conditioning` is `(B, D)`. At initialisation both gates are zero, and the
    block returns its input.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.attn = SiTAttention(dim, heads, head_dim, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu-approximate")  # the tanh form of GELU
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        modulation = self.modulation(F.silu(conditioning)).unsqueeze(1)  # (B, 1, 6 D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)

        norm_hidden_states = self.norm1(hidden_states) * (1 + scale_msa) + shift_msa
        hidden_states = hidden_states + gate_msa * self.attn(norm_hidden_states, **(attention_kwargs or {}))

        norm_hidden_states = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        return hidden_states + gate_mlp * self.ff(norm_hidden_states)


def _skip_attention(attn: SiTAttention, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states


# diffusers' caches (FirstBlockCache, MagCache) and skip-layer guidance look up here what blocks and processors return.
TransformerBlockRegistry.register(SiTTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
AttentionProcessorRegistry.register(SiTAttnProcessor, AttentionProcessorMetadata(_skip_attention))


class SiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin, CacheMixin):
    r"""Class-conditional SiT with the architecture, initialisation and parameter counts of the official code.

    The defaults are SiT-XL/2 on 32 x 32 latents (256 px images); [`SiTTransformer2DModel.from_preset`] builds the
    other sizes of the paper. With `class_token_dim` it is the model of REG (Wu et al. 2025,
    https://arxiv.org/abs/2507.01467), which denoises a vision encoder's class token together with the latents.

    ```python
    model = SiTTransformer2DModel.from_preset("SiT-B/2", num_classes=10)
    velocity = model(x_t, timestep=1000 * t, class_labels=labels).sample  # x_t (B, 4, 32, 32), t and labels (B,)
    ```

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to 32): native height and width of the latents. Latents of
            another size work too, with positions computed on the fly.
        patch_size (`int`, defaults to 2): height and width of a patch.
        in_channels (`int`, defaults to 4): channels of the latents.
        out_channels (`int`, *optional*): channels of the velocity, by default `in_channels`.
        num_layers (`int`, defaults to 28): number of transformer blocks.
        num_attention_heads (`int`, defaults to 16): number of attention heads.
        attention_head_dim (`int`, defaults to 72): width of a head; the width of a token is heads times head width.
        mlp_ratio (`float`, defaults to 4.0): width of the MLP relative to the width of a token.
        num_classes (`int`, defaults to 1000): number of classes. Label `num_classes` is the null class.
        class_dropout_prob (`float`, defaults to 0.1): probability with which training replaces a label by the null
            class. With 0 there is no null class, and so no classifier-free guidance.
        qk_norm (`bool`, defaults to `False`): layer norm on queries and keys.
        norm_eps (`float`, defaults to 1e-6): epsilon of the layer norms.
        timestep_scale (`float`, defaults to 1000.0): timesteps are divided by it to give t in [0, 1].
        class_token_dim (`int`, *optional*): width of REG's class token; by default there is none.

    Raises:
        ValueError: an argument is out of range, `sample_size` is not a multiple of `patch_size`, or the width of a
            token is not a multiple of 4.
    """

    PRESETS = SIT_PRESETS
    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTTransformerBlock"]
    _repeated_blocks = ["SiTTransformerBlock"]
    _skip_layerwise_casting_patterns = [
        "patch_embed",
        "time_embed",
        "label_embed",
        "class_token",
        "norm",
        "modulation",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        timestep_scale: float = 1000.0,
        class_token_dim: int | None = None,
    ) -> None:
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self._check_config(height, width)
        self.grid_size = (height // patch_size, width // patch_size)

        self.patch_embed = SiTPatchEmbed(in_channels, patch_size, self.inner_dim)
        self.register_buffer("pos_embed", torch.zeros(1, self.grid_size[0] * self.grid_size[1], self.inner_dim))
        self.time_embed = SiTTimestepEmbedding(self.inner_dim)
        self.label_embed = nn.Embedding(num_classes + (1 if class_dropout_prob > 0 else 0), self.inner_dim)

        if class_token_dim is not None:
            self.class_token_embed = nn.Linear(class_token_dim, self.inner_dim)
            self.class_token_norm = nn.LayerNorm(self.inner_dim, eps=norm_eps)
            self.class_token_proj_out = nn.Linear(self.inner_dim, class_token_dim)

        self.transformer_blocks = nn.ModuleList(
            SiTTransformerBlock(
                self.inner_dim, num_attention_heads, attention_head_dim, mlp_ratio, qk_norm=qk_norm, norm_eps=norm_eps
            )
            for _ in range(num_layers)
        )

        self.norm_out = nn.LayerNorm(self.inner_dim, eps=norm_eps, elementwise_affine=False)
        self.modulation_out = nn.Linear(self.inner_dim, 2 * self.inner_dim)
        self.proj_out = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels)

        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> SiTTransformer2DModel:
        """A new model of a size in `SIT_PRESETS`, for example `from_preset("SiT-B/2", num_classes=10)`.

        Args:
            name (`str`): `"SiT-{S,B,L,XL}/{2,4,8}"`: the size, then the patch size.
            **overrides: any other argument of the constructor; it wins over the preset.

        Raises:
            ValueError: the name is unknown.
        """
        if name not in SIT_PRESETS:
            raise ValueError(f"Unknown preset {name!r}: the presets are {', '.join(SIT_PRESETS)}.")
        return cls(**{**SIT_PRESETS[name], **overrides})

    @property
    def null_class_label(self) -> int | None:
        """The label of the null class, `None` for a model without one (`class_dropout_prob=0`)."""
        return self.config.num_classes if self.config.class_dropout_prob > 0 else None

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Sets all weights to the initial values of the official code, with which the output is exactly zero.

        Linear layers are Xavier-uniform with zero bias. The official code has ONE layer for queries, keys and values,
        of shape (3 D, D): its bound is sqrt(6 / (4 D)), not the sqrt(6 / (2 D)) of a (D, D) layer.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = math.sqrt(0.5) if name.endswith((".to_q", ".to_k", ".to_v")) else 1.0
                nn.init.xavier_uniform_(module.weight, gain=gain)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

        table = sincos_position_table(*self.grid_size, self.inner_dim, device="cpu", dtype=torch.float64)
        self.pos_embed.copy_(table)

        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.inner_dim, -1))
        nn.init.normal_(self.label_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_2.weight, std=0.02)

        for name, module in self.named_modules():
            if name.rpartition(".")[2] in ("modulation", "modulation_out", "proj_out", "class_token_proj_out"):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        class_token: torch.Tensor | None = None,
        class_drop_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> SiTTransformer2DModelOutput | tuple[torch.Tensor, ...]:
        """Predicts the velocity of noisy latents.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, H, W)`): noisy latents x_t in the dtype of the model; H and
                W are multiples of the patch size, otherwise free.
            timestep (`torch.Tensor` or number): `timestep_scale * t`, continuous; one number or shape `(B,)`.
            class_labels (`torch.Tensor` of shape `(B,)`): whole numbers from 0 to `num_classes` (the null class).
                Values are not checked here: that would make the CPU wait for the GPU.
            class_token (`torch.Tensor` of shape `(B, class_token_dim)`, *optional*): REG's noisy class token at the
                same t; needed by a model with `class_token_dim`, refused by any other.
            class_drop_mask (`torch.Tensor` of shape `(B,)`, *optional*): bool, `True` where the null class replaces
                the label, in training and evaluation. Without it, a model in training draws its own mask.
            attention_kwargs (`dict`, *optional*): `"scale"` weights LoRA layers; other entries go to the attention
                processor.
            return_dict (`bool`, defaults to `True`): whether to return an output object instead of a tuple.

        Returns:
            `SiTTransformer2DModelOutput`, or the tuple of its tensors with `sample` first.

        Raises:
            ValueError: a shape or dtype does not fit the model, or `class_token` and `class_token_dim` do not match.
        """
        self._check_inputs(hidden_states, class_labels, class_token, class_drop_mask)
        batch_size, _, height, width = hidden_states.shape
        rows, columns = height // self.config.patch_size, width // self.config.patch_size

        time = self._time(timestep, batch_size, hidden_states.device)
        labels = self._drop_labels(class_labels, class_drop_mask)
        conditioning = self.time_embed(time, hidden_states.dtype) + self.label_embed(labels)  # (B, D)

        hidden_states = self.patch_embed(hidden_states)  # (B, N, D)
        hidden_states = hidden_states + self._positions(rows, columns, hidden_states.device)
        if class_token is not None:
            # The class token has no position. (B, 1 + N, D)
            class_token = self.class_token_norm(self.class_token_embed(class_token))
            hidden_states = torch.cat([class_token.unsqueeze(1), hidden_states], dim=1)

        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning, attention_kwargs)
            else:
                hidden_states = block(hidden_states, conditioning, attention_kwargs)

        shift, scale = self.modulation_out(F.silu(conditioning)).unsqueeze(1).chunk(2, dim=-1)
        hidden_states = self.norm_out(hidden_states) * (1 + scale) + shift
        if class_token is not None:
            class_token, hidden_states = self.class_token_proj_out(hidden_states[:, 0]), hidden_states[:, 1:]
        sample = self._unpatchify(self.proj_out(hidden_states), rows, columns)

        if not return_dict:
            return (sample,) if class_token is None else (sample, class_token)
        return SiTTransformer2DModelOutput(sample=sample, class_token=class_token)

    def _time(self, timestep: torch.Tensor | float, batch_size: int, device: torch.device) -> torch.Tensor:
        """Any form of timestep to t in [0, 1], shape `(B,)`, float32."""
        if not isinstance(timestep, torch.Tensor):
            # A sum keeps the number symbolic under torch.compile; torch.full would recompile for each value.
            timestep = torch.zeros((), dtype=torch.float32, device=device) + timestep
        # Comparisons one by one, which torch.compile can make on symbolic sizes.
        length = timestep.shape[0] if timestep.ndim == 1 else 1
        if timestep.ndim > 1 or (length != 1 and length != batch_size):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}, but must be one number or have shape ({batch_size},), "
                "one value per sample of hidden_states."
            )
        return (timestep.to(device=device, dtype=torch.float32) / self.config.timestep_scale).expand(batch_size)

    def _drop_labels(self, class_labels: torch.Tensor, class_drop_mask: torch.Tensor | None) -> torch.Tensor:
        """Labels `(B,)` with the null class where the mask, or training's own draw, says so."""
        labels = class_labels.long()
        if class_drop_mask is None and self.training and self.null_class_label is not None:
            class_drop_mask = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout_prob
        if class_drop_mask is None:
            return labels
        return labels.masked_fill(class_drop_mask, self.config.num_classes)

    def _positions(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """The stored table for the native grid (a checkpoint's own may differ slightly), else a computed one."""
        if (rows, columns) == self.grid_size:
            return self.pos_embed
        return sincos_position_table(rows, columns, self.inner_dim, device=device).to(self.pos_embed.dtype)

    def _unpatchify(self, tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Tokens `(B, N, p * p * C_out)`, channel fastest, to `(B, C_out, H, W)`."""
        patch_size = self.config.patch_size
        tokens = tokens.unflatten(1, (rows, columns)).unflatten(3, (patch_size, patch_size, self.out_channels))
        return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _check_config(self, height: int, width: int) -> None:
        config = self.config
        counts = (
            "patch_size",
            "in_channels",
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "num_classes",
        )
        for name in (*counts, "mlp_ratio", "timestep_scale"):
            if config[name] <= 0:
                raise ValueError(f"{name} is {config[name]}, but must be positive.")
        for name in ("out_channels", "class_token_dim"):
            if config[name] is not None and config[name] <= 0:
                raise ValueError(f"{name} is {config[name]}, but must be positive or None.")
        if not 0 <= config.class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob is {config.class_dropout_prob}, but must be between 0 and 1.")
        if min(height, width) <= 0 or height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"sample_size is {height} x {width}, but both sides must be positive multiples of "
                f"patch_size={config.patch_size}."
            )
        if self.inner_dim % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim is {self.inner_dim}, but must be a multiple of 4 for the "
                "position embedding."
            )

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor,
        class_token: torch.Tensor | None,
        class_drop_mask: torch.Tensor | None,
    ) -> None:
        """Refuses shapes and dtypes that cannot be right; looks at no value, so it costs no device synchronisation."""
        patch_size, token_dim = self.config.patch_size, self.config.class_token_dim
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"hidden_states have shape {tuple(hidden_states.shape)}, but must have shape (B, C, H, W) with "
                f"C = in_channels = {self.config.in_channels}."
            )
        batch_size, _, height, width = hidden_states.shape
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"hidden_states are {height} x {width}, but both sides must be multiples of patch_size={patch_size}."
            )
        if class_labels.is_floating_point() or class_labels.dtype == torch.bool or class_labels.shape != (batch_size,):
            raise ValueError(
                f"class_labels have shape {tuple(class_labels.shape)} and dtype {class_labels.dtype}, but must be "
                f"whole numbers of shape ({batch_size},)."
            )
        found_shape = None if class_token is None else tuple(class_token.shape)
        expected_shape = None if token_dim is None else (batch_size, token_dim)
        if found_shape != expected_shape:
            found = "no class_token" if found_shape is None else f"class_token of shape {found_shape}"
            expected = "none" if expected_shape is None else f"one of shape {expected_shape}"
            raise ValueError(f"Found {found}, but a model with class_token_dim={token_dim} takes {expected}.")
        if class_drop_mask is None:
            return
        if self.null_class_label is None:
            raise ValueError("class_drop_mask needs a null class, but the model has class_dropout_prob=0.")
        if class_drop_mask.dtype != torch.bool or class_drop_mask.shape != (batch_size,):
            raise ValueError(
                f"class_drop_mask has shape {tuple(class_drop_mask.shape)} and dtype {class_drop_mask.dtype}, but "
                f"must be bool of shape ({batch_size},)."
            )
