"""MoCo-v3 from its public weights, as a `transformers.ViTModel`.

The weights are a plain ViT in the naming of timm, fused qkv, without a config: in the official checkpoints
(facebookresearch/moco-v3, `main_moco.py`) under `state_dict` with the prefix `module.base_encoder.`, in Hub uploads
bare. The number of heads cannot be read off the shapes; it comes from the official `vits.py`, where the small model
has twelve.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from diffusers_srepa.errors import ConfigurationError, one_line
from diffusers_srepa.teachers.vision_tower import LOAD_ERRORS, check_complete, quiet_transformers


WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
HEADS_BY_WIDTH = {384: 12, 768: 12, 1024: 16, 1280: 16}
PATCH_WEIGHT = "patch_embed.proj.weight"

# timm's names -> the names of ViT checkpoints on the Hub, which every version of transformers reads.
TENSOR_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def load_moco_v3(path: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A `ViTModel` with the weights of a MoCo-v3 file (`.safetensors`, or any file that `torch.save` wrote).

    Raises:
        ConfigurationError: the file cannot be read safely, or is no plain ViT of a published size.
    """
    state_dict = _bare_state_dict(_read(Path(path)), str(path))
    arguments: dict[str, Any] = {
        "config": _config_of(state_dict, str(path)),
        "state_dict": convert_state_dict(state_dict, str(path)),
        "add_pooling_layer": False,
        "dtype": dtype,
    }
    try:
        with quiet_transformers():
            model, report = transformers.ViTModel.from_pretrained(None, output_loading_info=True, **arguments)
    except LOAD_ERRORS as error:
        raise ConfigurationError(f"the MoCo-v3 weights {str(path)!r} do not fit ({one_line(error)}).") from error
    check_complete(report, str(path))
    return model


def convert_state_dict(state_dict: dict[str, torch.Tensor], origin: str = "state dict") -> dict[str, torch.Tensor]:
    """Rename timm's keys to those of ViT checkpoints on the Hub, with each qkv matrix split into three."""
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        block = BLOCK_KEY.fullmatch(key)
        if block:
            converted |= _convert_block_tensor(block[1], block[2], block[3], tensor, origin)
            continue
        module, _, kind = key.rpartition(".")
        if key in TENSOR_NAMES:
            converted[TENSOR_NAMES[key]] = tensor
        elif module in TENSOR_NAMES:
            converted[f"{TENSOR_NAMES[module]}.{kind}"] = tensor
        else:
            raise _unknown(key, origin)
    return converted


def _convert_block_tensor(
    index: str, module: str, kind: str, tensor: torch.Tensor, origin: str
) -> dict[str, torch.Tensor]:
    prefix = f"encoder.layer.{index}"
    if module == "attn.qkv":
        parts = zip(("query", "key", "value"), tensor.chunk(3, dim=0), strict=True)
        return {f"{prefix}.attention.attention.{name}.{kind}": part.contiguous() for name, part in parts}
    # One published ViT-L file calls the layers of its blocks 13 and 14 norm13, fc13, norm14, fc14 (REPA repairs it
    # too): there 13 stands for 1 and 14 for 2.
    module = re.sub(r"(norm|fc)1([34])$", lambda found: found[1] + {"3": "1", "4": "2"}[found[2]], module)
    if module not in BLOCK_NAMES:
        raise _unknown(f"blocks.{index}.{module}.{kind}", origin)
    return {f"{prefix}.{BLOCK_NAMES[module]}.{kind}": tensor}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint fails in as many ways as there are bytes
        # What torch says about pickles is a page of advice, which ends in switching the protection off.
        is_pickle = isinstance(error, UnpicklingError)
        reason = "it holds other objects, or is no checkpoint" if is_pickle else one_line(error)
        raise ConfigurationError(
            f"the MoCo-v3 weights {str(path)!r} cannot be read as tensors only ({reason}): give a .safetensors file "
            f"or a checkpoint without pickled objects."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return content if isinstance(content, dict) else {}


def _bare_state_dict(state_dict: dict[str, Any], origin: str) -> dict[str, torch.Tensor]:
    """The encoder alone: prefixes stripped, classification and contrastive heads dropped."""
    prefixes = [key.removesuffix(PATCH_WEIGHT) for key in state_dict if key.endswith(PATCH_WEIGHT)]
    # A full checkpoint holds the encoder twice; like REPA, take the trained one and not its momentum copy.
    prefixes.sort(key=lambda prefix: ("momentum" in prefix, len(prefix)))
    if not prefixes:
        raise ConfigurationError(
            f"{origin!r} does not hold a plain ViT in timm's naming (no {PATCH_WEIGHT}): a weights file, "
            f"`weight_name` and a config.json without model_type are for MoCo-v3 alone."
        )
    names = {key.removeprefix(prefixes[0]): key for key in state_dict if key.startswith(prefixes[0])}
    return {name: state_dict[key] for name, key in names.items() if name.split(".")[0] not in ("head", "fc")}


def _config_of(state_dict: dict[str, torch.Tensor], origin: str) -> transformers.ViTConfig:
    width, _, patch_size, _ = state_dict[PATCH_WEIGHT].shape
    if width not in HEADS_BY_WIDTH:
        raise ConfigurationError(
            f"the MoCo-v3 weights {origin!r} have width {width}, but the published models have "
            f"{', '.join(map(str, HEADS_BY_WIDTH))}: the number of heads is unknown."
        )
    indices = {int(found[1]) for found in map(BLOCK_KEY.fullmatch, state_dict) if found}
    needed = [key for key in ("pos_embed", "blocks.0.mlp.fc1.weight") if key not in state_dict]
    if needed:
        raise ConfigurationError(f"the MoCo-v3 weights {origin!r} lack {needed[0]}.")
    side = math.isqrt(state_dict["pos_embed"].shape[1] - 1)
    return transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=max(indices) + 1,
        num_attention_heads=HEADS_BY_WIDTH[width],
        intermediate_size=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        image_size=side * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
        qkv_bias="blocks.0.attn.qkv.bias" in state_dict,
    )


def _unknown(key: str, origin: str) -> ConfigurationError:
    return ConfigurationError(f"the MoCo-v3 weights {origin!r} hold {key!r}, which a plain ViT does not have.")
