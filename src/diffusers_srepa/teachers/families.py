"""The table of teacher families: how to reach the vision tower of a checkpoint, and which of its tokens to use.

A row is keyed by the `model_type` that a Hub repository writes into its `config.json`; sizes (S, B, L, g), patch
sizes and the number of register tokens come from that config and need no rows of their own. Adding a teacher is adding
a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch


Statistics = tuple[float, float, float]

IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)
CLIP_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)
HALF: Statistics = (0.5, 0.5, 0.5)

MOCO_V3 = "moco_v3"


def plain_inputs(pixel_values: torch.Tensor, patch_size: int) -> dict[str, Any]:
    """For towers that read the grid from the image."""
    return {"pixel_values": pixel_values}


def interpolating_inputs(pixel_values: torch.Tensor, patch_size: int) -> dict[str, Any]:
    """For towers that refuse any size but their own unless asked to interpolate their position table."""
    return {"pixel_values": pixel_values, "interpolate_pos_encoding": True}


def unshuffled_inputs(pixel_values: torch.Tensor, patch_size: int) -> dict[str, Any]:
    """For masked autoencoders, which sort the tokens by `noise`: rising noise keeps them in row-major order."""
    batch_size, _, height, width = pixel_values.shape
    num_patches = (height // patch_size) * (width // patch_size)
    noise = torch.arange(num_patches, dtype=torch.float32, device=pixel_values.device).expand(batch_size, -1)
    return {"pixel_values": pixel_values, "noise": noise, "interpolate_pos_encoding": True}


def patchified_inputs(pixel_values: torch.Tensor, patch_size: int) -> dict[str, Any]:
    """For NaFlex towers, which take a sequence of flattened patches `(B, h * w, p * p * 3)`, channels fastest."""
    batch_size, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, rows * columns, -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(batch_size, rows * columns, dtype=torch.long, device=pixel_values.device),
        # The tower reads these numbers in Python: on the CPU that costs no synchronisation.
        "spatial_shapes": torch.tensor([[rows, columns]]).expand(batch_size, 2),
    }


@dataclass(frozen=True)
class TeacherFamily:
    """One row of the table.

    Args:
        model_type (`str`): the `model_type` of the repository's config.
        vision_class (`str`, *optional*): the `transformers` class of the vision tower, loaded directly so that a dual
            encoder's text half is never built; `None` loads `AutoModel`.
        image_mean, image_std (`tuple[float, float, float]`): used when the repository has no image processor.
        has_class_token (`bool`, *optional*): whether token 0 is a class token; `None` counts the tokens instead.
        tokens (`str`): `"last_hidden_state"`, or `"last_block"` for the residual stream before the final norm.
        inputs (`Callable`): from normalised images `(B, 3, H, W)` and the patch size to the tower's keyword arguments.
        class_arguments (`Mapping`): keyword arguments of the vision class.
        config_overrides (`Mapping`): values set on the loaded tower's config.
    """

    model_type: str
    vision_class: str | None
    image_mean: Statistics = IMAGENET_MEAN
    image_std: Statistics = IMAGENET_STD
    has_class_token: bool | None = True
    tokens: Literal["last_hidden_state", "last_block"] = "last_hidden_state"
    inputs: Callable[[torch.Tensor, int], dict[str, Any]] = plain_inputs
    class_arguments: Mapping[str, Any] = field(default_factory=dict)
    config_overrides: Mapping[str, Any] = field(default_factory=dict)


# The pooler is a head of its own: not building it saves memory, and checkpoints without one stay complete.
_VIT: dict[str, Any] = {
    "vision_class": "ViTModel",
    "inputs": interpolating_inputs,
    "class_arguments": {"add_pooling_layer": False},
}
# REPA and iREPA take CLIP's and MAE's tokens before the last norm (numerically, what the last block returns).
_CLIP: dict[str, Any] = {
    "vision_class": "CLIPVisionModel",
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "tokens": "last_block",
    "inputs": interpolating_inputs,
}
_SIGLIP: dict[str, Any] = {"image_mean": HALF, "image_std": HALF, "has_class_token": False}

_ROWS = (
    TeacherFamily("dinov2", "Dinov2Model"),
    TeacherFamily("dinov2_with_registers", "Dinov2WithRegistersModel"),
    TeacherFamily("dinov3_vit", "DINOv3ViTModel"),
    TeacherFamily("vit", **_VIT),
    TeacherFamily(MOCO_V3, **_VIT),
    TeacherFamily(
        "vit_mae",
        "ViTMAEModel",
        tokens="last_block",
        inputs=unshuffled_inputs,
        config_overrides={"mask_ratio": 0.0},
    ),
    TeacherFamily("ijepa", "IJepaModel", has_class_token=False, inputs=interpolating_inputs),
    TeacherFamily("clip", **_CLIP),
    TeacherFamily("clip_vision_model", **_CLIP),
    TeacherFamily("siglip", "SiglipVisionModel", inputs=interpolating_inputs, **_SIGLIP),
    TeacherFamily("siglip_vision_model", "SiglipVisionModel", inputs=interpolating_inputs, **_SIGLIP),
    TeacherFamily("siglip2", "Siglip2VisionModel", inputs=patchified_inputs, **_SIGLIP),
    TeacherFamily("siglip2_vision_model", "Siglip2VisionModel", inputs=patchified_inputs, **_SIGLIP),
)

TABLE: dict[str, TeacherFamily] = {row.model_type: row for row in _ROWS}


def family_of(model_type: str) -> TeacherFamily:
    """The row of `model_type`, or the generic row for a type that the table does not know.

    The generic row loads `AutoModel`, takes `last_hidden_state`, and counts its tokens: what exceeds the grid are
    prefix tokens, the first of them the class token.
    """
    return TABLE.get(model_type) or TeacherFamily(model_type, vision_class=None, has_class_token=None)
