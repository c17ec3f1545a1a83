"""Projectors: from the student's token width to the teacher's, used in training only.

Each is a model of its own with its own configuration, saved by `save_pretrained` in its own folder, never inside the
transformer. A projector takes a `TokenMap` (or plain tokens `(B, N, D)`, where the grid plays no role) and returns the
same kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.tokens import TokenMap


WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"

Tokens = TypeVar("Tokens", TokenMap, torch.Tensor)


class _TokenwiseProjector(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Linear layers, applied to every token, prefix tokens included; a subclass says which module holds them."""

    takes_token_map = True
    layers_name: ClassVar[str]

    def initialize_weights(self) -> None:
        """Xavier-uniform weights and zero biases, as in REPA and iREPA."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens of shape `(B, P + N, in_dim)` to `(B, P + N, out_dim)`, a `TokenMap` or a tensor.

        Raises:
            ValueError: they are neither, or have another width.
        """
        if isinstance(tokens, TokenMap):
            return tokens.with_tokens(self(tokens.tokens))
        if not isinstance(tokens, torch.Tensor):
            raise ValueError(
                f"a {type(self).__name__} takes a TokenMap or a tensor of tokens (B, N, D), but got a "
                f"{type(tokens).__name__}."
            )
        _check_width(self, tokens)
        return getattr(self, self.layers_name)(tokens)


class MLPProjector(_TokenwiseProjector):
    """REPA's projector: Linear, SiLU, Linear, SiLU, Linear, applied to every token, prefix tokens included.

    Args:
        in_dim (`int`): width D of the student's tokens.
        out_dim (`int`): width of the teacher's tokens.
        hidden_dim (`int`, *optional*, defaults to 2048): width of the two hidden layers.
    """

    layers_name = "layers"

    @register_to_config
    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048) -> None:
        super().__init__()
        _check_positive(in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim)
        self.in_dim = in_dim
        self.layers = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, out_dim),
        )
        self.initialize_weights()


class LinearProjector(_TokenwiseProjector):
    """One linear layer, applied to every token, prefix tokens included.

    Args:
        in_dim (`int`): width D of the student's tokens.
        out_dim (`int`): width of the teacher's tokens.
    """

    layers_name = "linear"

    @register_to_config
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        _check_positive(in_dim=in_dim, out_dim=out_dim)
        self.in_dim = in_dim
        self.linear = nn.Linear(in_dim, out_dim)
        self.initialize_weights()


class ConvProjector(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """iREPA's projector (arXiv 2512.10794): one convolution over the token grid, zero-padded to keep its size.

    Prefix tokens have no place on the grid: they are dropped, so what is aligned afterwards are patch tokens alone.

    Args:
        in_dim (`int`): width D of the student's tokens.
        out_dim (`int`): width of the teacher's tokens.
        kernel_size (`int`, *optional*, defaults to 3):
            odd; iREPA's paper says 3, the configuration it released runs 1.
    """

    takes_token_map = True

    @register_to_config
    def __init__(self, in_dim: int, out_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        _check_positive(in_dim=in_dim, out_dim=out_dim, kernel_size=kernel_size)
        self.in_dim = in_dim
        if kernel_size % 2 == 0:
            raise ConfigurationError(
                f"the projector's kernel_size is {kernel_size}, but must be odd, so that the grid keeps its size."
            )
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, padding=kernel_size // 2)

    def initialize_weights(self) -> None:
        """PyTorch's own initialisation of a convolution, which iREPA leaves in place."""
        self.conv.reset_parameters()

    def forward(self, tokens: TokenMap) -> TokenMap:
        """A `TokenMap` of width `in_dim` to one of patch tokens `(B, N, out_dim)` on the same grid.

        Raises:
            ValueError: plain tokens without a grid are given, or tokens of another width.
        """
        if not isinstance(tokens, TokenMap):
            raise ValueError("a ConvProjector needs the token grid: call it with a TokenMap, not with plain tokens.")
        _check_width(self, tokens.tokens)
        return TokenMap.from_map(self.conv(tokens.patch_map()))


def save_projector(projector: nn.Module, folder: Path) -> None:
    """Write a projector by its `save_pretrained`, or as bare safetensors weights if it has none."""
    if isinstance(projector, ModelMixin):
        projector.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because safetensors refuses tensors that share memory.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in projector.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)


def read_projector(projector: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The state dict that `save_projector` wrote, refused if it is of another class or of other sizes."""
    if not (folder / WEIGHTS_FILE).is_file():
        raise ConfigurationError(
            f"there are no projector weights in {folder}: give the folder that holds {folder.name!r}."
        )
    saved_class = saved_class_name(folder)
    if saved_class not in (None, type(projector).__name__):
        raise ConfigurationError(
            f"{folder} holds a {saved_class}, but this projector is a {type(projector).__name__}: change the "
            "projector."
        )
    state = load_file(folder / WEIGHTS_FILE)
    expected = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != expected:
        raise ConfigurationError(
            f"{folder} holds a projector of shapes {found}, but this one has {expected}: change the projector, the "
            "transformer or the teacher."
        )
    return state


def saved_class_name(folder: Path) -> str | None:
    """The class that a projector's folder names, None if it holds bare weights."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text()).get("_class_name")
    except ValueError:
        raise ConfigurationError(f"{file} is no valid JSON: give the folder of a saved projector.") from None


def _check_width(projector: Any, tokens: torch.Tensor) -> None:
    """Raise unless the tokens are as wide as the projector was built for."""
    if tokens.shape[-1] != projector.in_dim:
        raise ValueError(
            f"the {type(projector).__name__} was built for tokens of width {projector.in_dim}, but got tokens of "
            f"shape {tuple(tokens.shape)}: set its in_dim to {tokens.shape[-1]}, or tap another module."
        )


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"the projector's {name} is {size!r}, but must be a positive whole number.")
