"""Tokens that know their grid: what flows between student, projector, teacher and objective.

Tokens have shape `(B, P + N, D)`: P prefix tokens (a class token, registers) followed by N = h * w patch tokens in
row-major order. The grid `(h, w)` travels with them and is never recovered from `sqrt(N)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from diffusers_srepa.errors import ConfigurationError


Grid = tuple[int, int]
"""Rows and columns of patch tokens."""


@dataclass(frozen=True)
class TokenMap:
    """Tokens of a batch with the grid of their patches.

    Args:
        tokens (`torch.Tensor`): shape `(B, P + N, D)`, prefix tokens first.
        grid (`tuple[int, int]`): rows and columns `(h, w)` of the patch tokens, `h * w == N`.
        num_prefix_tokens (`int`): P.

    Raises:
        ValueError: the number of tokens is not `P + h * w`, or `tokens` has not three dimensions.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise ValueError(f"tokens must have shape (B, N, D), but have shape {tuple(self.tokens.shape)}.")
        height, width = check_grid(self.grid, "the grid of a TokenMap")
        expected = self.num_prefix_tokens + height * width
        if self.tokens.shape[1] != expected:
            raise ValueError(
                f"{self.tokens.shape[1]} tokens do not fill a grid of {height} x {width} with "
                f"{self.num_prefix_tokens} prefix tokens, which takes {expected}: check the grid and the prefix count."
            )

    @property
    def patch_tokens(self) -> torch.Tensor:
        """The patch tokens, shape `(B, N, D)`."""
        return self.tokens[:, self.num_prefix_tokens :]

    @property
    def prefix_tokens(self) -> torch.Tensor:
        """The prefix tokens, shape `(B, P, D)`."""
        return self.tokens[:, : self.num_prefix_tokens]

    @property
    def dim(self) -> int:
        """The width D of a token."""
        return self.tokens.shape[-1]

    def patch_map(self) -> torch.Tensor:
        """The patch tokens as a map, shape `(B, D, h, w)`."""
        return self.patch_tokens.transpose(1, 2).unflatten(2, self.grid)

    def with_tokens(self, tokens: torch.Tensor) -> TokenMap:
        """The same grid and prefix count with other `tokens` of shape `(B, P + N, D')`."""
        return replace(self, tokens=tokens)

    def without_prefix(self) -> TokenMap:
        """The patch tokens alone."""
        return TokenMap(self.patch_tokens, self.grid)

    def detach(self) -> TokenMap:
        """The same tokens outside the graph."""
        return self.with_tokens(self.tokens.detach())

    def float(self) -> TokenMap:
        """The same tokens in float32; float64 stays as it is."""
        return self if self.tokens.dtype == torch.float64 else self.with_tokens(self.tokens.float())

    @classmethod
    def from_map(cls, feature_map: torch.Tensor) -> TokenMap:
        """Patch tokens of a map of shape `(B, D, h, w)`, without prefix tokens.

        Raises:
            ValueError: the map has another number of dimensions.
        """
        if feature_map.ndim != 4:
            raise ValueError(f"a feature map must have shape (B, D, h, w), but has shape {tuple(feature_map.shape)}.")
        height, width = feature_map.shape[2:]
        return cls(feature_map.flatten(2).transpose(1, 2), (height, width))


@dataclass(frozen=True)
class TeacherFeatures:
    """What a frozen teacher says about a batch of images.

    Args:
        patch_tokens (`torch.Tensor`): shape `(B, N, D)`, float32, class and register tokens dropped.
        grid (`tuple[int, int]`): `(h, w)` of the patch tokens.
        class_token (`torch.Tensor`, *optional*): shape `(B, D)`, raw scale, for teachers that have one.

    Raises:
        ValueError: the tokens do not fill the grid, or the class token has another shape.
    """

    patch_tokens: torch.Tensor
    grid: tuple[int, int]
    class_token: torch.Tensor | None = None

    def __post_init__(self) -> None:
        TokenMap(self.patch_tokens, self.grid)
        shape = (self.patch_tokens.shape[0], self.patch_tokens.shape[2])
        if self.class_token is not None and tuple(self.class_token.shape) != shape:
            raise ValueError(f"class_token must have shape {shape}, but has shape {tuple(self.class_token.shape)}.")

    def token_map(self, include_class_token: bool = False) -> TokenMap:
        """The features as a `TokenMap`; with `include_class_token` the class token is prepended as a prefix token.

        Raises:
            ValueError: the class token is asked for and this teacher has none.
        """
        if not include_class_token:
            return TokenMap(self.patch_tokens, self.grid)
        if self.class_token is None:
            raise ValueError(
                "this teacher has no class token: choose a teacher with one, or leave the class token out."
            )
        tokens = torch.cat([self.class_token.unsqueeze(1), self.patch_tokens], dim=1)
        return TokenMap(tokens, self.grid, num_prefix_tokens=1)


def check_grid(grid: object, what: str) -> tuple[int, int]:
    """A grid as `(rows, columns)`; a `ConfigurationError`, in which `what` names it, if it is something else."""
    # Symbolic sizes of torch.compile are no `int`.
    if isinstance(grid, tuple | list | torch.Size) and len(grid) == 2:
        if all(isinstance(n, int | torch.SymInt) and not isinstance(n, bool) and n > 0 for n in grid):
            return int(grid[0]), int(grid[1])
    raise ConfigurationError(f"{what} is {grid!r}, but must be two positive whole numbers (rows, columns).")


def resize_token_map(token_map: TokenMap, grid: tuple[int, int], mode: str = "area") -> TokenMap:
    """Resample the patch tokens to another grid `(h, w)`; prefix tokens stay as they are.

    The mode `"area"` averages the tokens that fall into a new cell (for shrinking), `"bilinear"` interpolates,
    antialiased when shrinking.
    """
    if mode not in ("area", "bilinear"):
        raise ValueError(f"the resize mode must be 'area' or 'bilinear', but is {mode!r}.")
    if tuple(token_map.grid) == tuple(grid):
        return token_map
    # Antialiasing and aligned corners are words of the bilinear mode alone.
    options = {"align_corners": False, "antialias": True} if mode == "bilinear" else {}
    resized = TokenMap.from_map(F.interpolate(token_map.patch_map(), size=grid, mode=mode, **options))
    tokens = torch.cat([token_map.prefix_tokens, resized.tokens], dim=1)
    return TokenMap(tokens, resized.grid, token_map.num_prefix_tokens)
