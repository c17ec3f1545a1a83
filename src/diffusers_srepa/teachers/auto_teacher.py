"""A frozen vision encoder that turns images in [0, 1] into patch tokens on a chosen grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_srepa.errors import ConfigurationError, one_line
from diffusers_srepa.hooks import FeatureTap
from diffusers_srepa.teachers.families import (
    MOCO_V3,
    TABLE,
    Statistics,
    TeacherFamily,
    family_of,
    interpolating_inputs,
)
from diffusers_srepa.teachers.moco_v3 import WEIGHT_NAMES, load_moco_v3
from diffusers_srepa.teachers.position_table import install_position_table
from diffusers_srepa.teachers.preprocessing import (
    check_images,
    check_range,
    check_statistics,
    load_statistics,
    normalize_images,
    resize_images,
)
from diffusers_srepa.teachers.source import TeacherSource
from diffusers_srepa.teachers.vision_tower import find_blocks, load_config, load_tower, read_geometry
from diffusers_srepa.tokens import Grid, TeacherFeatures, check_grid


# A tower with more leading tokens than a class token and a distillation token is not understood by the generic rule.
MAX_COUNTED_PREFIX = 2


class Teacher(nn.Module):
    """A frozen vision encoder: images in, patch tokens (and the class token, where there is one) out.

    Its input is `grid * patch_size` pixels, so that an image of any size with the grid's aspect ratio gives exactly
    that grid of tokens: 16 x 16 for DINOv2 is 224 pixels. A learned position table is resampled for the grid once,
    bicubic and antialiased in float32. The teacher stays in evaluation mode for ever and none of its parameters
    requires a gradient.

    Build one with [`Teacher.from_pretrained`]; the constructor takes a loaded tower.

    Args:
        tower (`nn.Module`): a vision tower of `transformers` with its `config`.
        family (`TeacherFamily`): the row that says how to call it and which tokens to use.
        grid (`tuple[int, int]`, *optional*): rows and columns of tokens; the tower's own grid by default.
        image_mean, image_std (`tuple[float, float, float]`, *optional*): the normalisation; the row's by default.
        layer (`int`, *optional*): use the output of this block, counted from 1, instead of the row's tokens.
        name_or_path (`str`): where the tower came from, for messages and records.

    Attributes: `model`, `model_type`, `name_or_path`, `grid`, `patch_size`, `input_size`, `feature_dim`,
    `num_prefix_tokens` (class and register tokens that are dropped), `has_class_token`, `image_mean`, `image_std`,
    `layer`.

    Raises:
        ConfigurationError: the grid is not two positive integers, the layer does not exist, or the tower is not a
            vision transformer.
    """

    def __init__(
        self,
        tower: nn.Module,
        family: TeacherFamily,
        grid: Sequence[int] | None = None,
        *,
        image_mean: Statistics | None = None,
        image_std: Statistics | None = None,
        layer: int | None = None,
        name_or_path: str = "",
    ) -> None:
        super().__init__()
        geometry = read_geometry(tower.config, name_or_path)
        self.name_or_path = name_or_path
        self.model_type = family.model_type
        self.family = _with_interpolation(family, tower)
        self.patch_size = geometry.patch_size
        self.feature_dim = geometry.feature_dim
        native_grid = geometry.native_grid
        if grid is None and native_grid is None:
            raise ConfigurationError(
                f"the config of the teacher {name_or_path!r} does not say its grid: give `grid` as (h, w)."
            )
        self.grid = check_grid(native_grid if grid is None else grid, "the teacher's `grid`")
        self.image_mean = image_mean or family.image_mean
        self.image_std = image_std or family.image_std
        self.layer = None if layer is None else _check_layer(layer, geometry.num_layers, name_or_path)
        self.tap: FeatureTap | None = None
        tapped_block = layer or (geometry.num_layers if family.tokens == "last_block" else None)
        if tapped_block is not None:
            blocks = find_blocks(tower, geometry.num_layers)
            # In some versions of `transformers` a block returns a tuple: entry 0 are the tokens.
            self.tap = FeatureTap(blocks, f"{tapped_block - 1}:0")
            if family.model_type in TABLE:
                del blocks[tapped_block:]  # nothing reads what they would compute
        install_position_table(tower, native_grid, self.grid, self.patch_size)
        self.model = tower
        self.requires_grad_(False)
        self.eval()
        self._range_is_known = False
        self.has_class_token, self.num_prefix_tokens = self._prefix(geometry.num_register_tokens)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        grid: Sequence[int] | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | str | None = None,
        layer: int | None = None,
        weight_name: str | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> Teacher:
        """Load a teacher from a Hub repository, a folder, or a file of MoCo-v3 weights.

        Args:
            name_or_path (`str`): a Hub id such as `"facebook/dinov2-base"`, a folder, or a weights file.
            grid (`tuple[int, int]`, *optional*): rows and columns of tokens wanted; by default the checkpoint's own.
            subfolder, revision, token, cache_dir, local_files_only: as in `transformers`.
            dtype (`torch.dtype` or `str`, *optional*): dtype of the weights, float32 by default. The features are
                float32 in any case.
            layer (`int`, *optional*): use the output of this block, counted from 1, without the final norm.
            weight_name (`str`, *optional*): a file of MoCo-v3 weights inside the repository or folder.
            image_mean, image_std (`Sequence[float]`, *optional*): override the image processor's numbers.

        Raises:
            ConfigurationError: the repository, its files or an option cannot be used; the sentence says which.
        """
        path = str(name_or_path)
        source = TeacherSource(
            path, subfolder, revision, token, None if cache_dir is None else str(cache_dir), local_files_only
        )
        wanted_grid = None if grid is None else check_grid(grid, "the teacher's `grid`")
        weights_dtype = _check_dtype(dtype)
        mean = None if image_mean is None else check_statistics(image_mean, "image_mean", path)
        std = None if image_std is None else check_statistics(image_std, "image_std", path)
        tower, family = _load(source, weight_name, weights_dtype)
        if family.model_type != MOCO_V3 and (mean is None or std is None):
            own_mean, own_std = load_statistics(source, family)
            mean, std = mean or own_mean, std or own_std
        return cls(tower, family, wanted_grid, image_mean=mean, image_std=std, layer=layer, name_or_path=path)

    @property
    def input_size(self) -> Grid:
        """Height and width in pixels of what the tower sees."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.model.parameters()).dtype

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode whatever `mode` says (some towers move their rotary embeddings in training mode)."""
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Teacher:
        """Move and cast like any module, except that float32 buffers keep their precision.

        Rotary frequencies rounded to half precision would shift every token; `transformers` keeps them in float32 too.
        """
        precise = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in precise.items():
            module_name, _, buffer_name = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved.dtype in (torch.float16, torch.bfloat16):
                setattr(self.get_submodule(module_name), buffer_name, buffer.to(moved.device))
        return self

    def forward(self, images: torch.Tensor, grid: Sequence[int] | None = None) -> TeacherFeatures:
        """Features of a batch.

        Args:
            images (`torch.Tensor`): float `(B, 3, H, W)` in [0, 1], of any size with the aspect ratio of the grid.
            grid (`tuple[int, int]`, *optional*): another grid for this call, as for rectangular images.

        Returns:
            `TeacherFeatures`: patch tokens `(B, h * w, D)` in row-major order and the class token `(B, D)` where there
            is one, both float32 and without a graph.

        Raises:
            ValueError: images of another type, shape, dtype, aspect ratio or range. The range is read in every call on
                the CPU and in the first call elsewhere, where reading it waits for the device.
        """
        grid = self.grid if grid is None else check_grid(grid, "the teacher's `grid`")
        check_images(images, grid)
        # Not `inference_mode`: a loss could not save such tensors for its backward pass.
        with torch.inference_mode(False), torch.no_grad():
            images = images.to(device=self.device, dtype=torch.float32)
            if not torch.compiler.is_compiling() and (images.device.type == "cpu" or not self._range_is_known):
                check_range(images)
                self._range_is_known = True
            tokens = self._tokens(images, grid).float()
            num_tokens = self.num_prefix_tokens + grid[0] * grid[1]
            if tokens.shape[1] != num_tokens:
                raise ValueError(
                    f"the teacher {self.name_or_path!r} returned {tokens.shape[1]} tokens for a grid of {grid[0]} x "
                    f"{grid[1]} with {self.num_prefix_tokens} class and register tokens, which makes {num_tokens}."
                )
            class_token = tokens[:, 0] if self.has_class_token else None
            return TeacherFeatures(tokens[:, self.num_prefix_tokens :], grid, class_token)

    def extra_repr(self) -> str:
        """What `print(teacher)` says beside the tower."""
        return f"model_type={self.model_type!r}, grid={self.grid}, input_size={self.input_size}, layer={self.layer}"

    def _tokens(self, images: torch.Tensor, grid: Grid) -> torch.Tensor:
        """All tokens of the tower, prefix tokens first, shape `(B, P + h * w, D)`."""
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        pixel_values = normalize_images(resize_images(images, size), self.image_mean, self.image_std)
        inputs = self.family.inputs(pixel_values.to(self.dtype), self.patch_size)
        if self.tap is None:
            return self.model(**inputs).last_hidden_state
        # Not a `with` statement: dynamo cannot enter a context manager that it did not see being made.
        self.tap.arm()
        try:
            self.model(**inputs)
            return self.tap.pop()
        finally:
            self.tap.disarm()

    @torch.no_grad()
    def _prefix(self, num_register_tokens: int) -> tuple[bool, int]:
        """Whether token 0 is a class token, and the number of tokens before the patches."""
        has_class_token = self.family.has_class_token
        if has_class_token is not None:
            return has_class_token, int(has_class_token) + num_register_tokens
        # The generic rule: run the tower once and count what exceeds the grid.
        name = f"the teacher {self.name_or_path!r} of the unknown type {self.model_type!r}"
        try:
            tokens = self._tokens(torch.zeros(1, 3, *self.input_size, device=self.device), self.grid)
            shape = tuple(tokens.shape)
        except Exception as error:
            raise ConfigurationError(
                f"{name} cannot be run at {self.input_size} pixels ({one_line(error)}): choose its own `grid` or one "
                f"of the families in docs/teachers.md."
            ) from error
        num_prefix = shape[1] - self.grid[0] * self.grid[1] if len(shape) == 3 else -1
        if not 0 <= num_prefix - num_register_tokens <= MAX_COUNTED_PREFIX:
            raise ConfigurationError(
                f"{name} returns hidden states of shape {shape} for a grid of {self.grid[0]} x {self.grid[1]} tokens, "
                f"which is not a vision transformer's: choose one of the families in docs/teachers.md."
            )
        return num_prefix > num_register_tokens, num_prefix


def _load(source: TeacherSource, weight_name: str | None, dtype: torch.dtype) -> tuple[nn.Module, TeacherFamily]:
    """The tower and its row: MoCo-v3 weights carry no config, everything else is chosen by `model_type`."""
    if Path(source.name_or_path).is_file():
        return load_moco_v3(source.name_or_path, dtype), TABLE[MOCO_V3]
    config = source.read_config() if weight_name is None else {}
    if "pretrained_cfg" in config:
        # Plain ViTs of timm have MoCo-v3's names, but other numbers of heads, means and standard deviations.
        raise ConfigurationError(
            f"the teacher {source.name_or_path!r} is a checkpoint of timm ({config.get('architecture')!r}), which is "
            f"not read: choose the repository of its transformers version, or give `weight_name` if it is MoCo-v3."
        )
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ConfigurationError(
            f"the config.json of the teacher {source.name_or_path!r} says model_type {model_type!r}, which is no "
            f"name: change `name_or_path`."
        )
    if model_type:
        family = family_of(model_type)
        read_geometry(load_config(source), source.name_or_path)  # before gigabytes of weights are fetched
        return load_tower(source, family, dtype), family
    for candidate in (weight_name,) if weight_name else WEIGHT_NAMES:
        path = source.find_file(candidate)
        if path is not None:
            return load_moco_v3(path, dtype), TABLE[MOCO_V3]
    if weight_name:
        raise ConfigurationError(
            f"the teacher {source.name_or_path!r} has no file {weight_name!r}: check `weight_name` (and, offline, "
            f"that it was downloaded before)."
        )
    raise ConfigurationError(
        f"the teacher {source.name_or_path!r} has no config.json that names a model_type, and no MoCo-v3 weights "
        f"({' or '.join(WEIGHT_NAMES)}): check `name_or_path`, `subfolder` and `weight_name`."
    )


def _check_layer(layer: int, num_layers: int, name_or_path: str) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= num_layers:
        raise ConfigurationError(
            f"`layer` of the teacher {name_or_path!r} is {layer!r}, but must be an integer from 1 to {num_layers}, "
            "its number of blocks."
        )
    return layer


def _with_interpolation(family: TeacherFamily, tower: nn.Module) -> TeacherFamily:
    """For a type without a row: ask the tower to interpolate if its forward knows the word."""
    if family.vision_class is None and "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        return replace(family, inputs=interpolating_inputs)
    return family


def _check_dtype(dtype: Any) -> torch.dtype:
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigurationError(f"the teacher's `dtype` must be a floating-point dtype of torch, but is {dtype!r}.")
    return found
