"""Tiny randomly initialised checkpoints, saved by the classes that the Hub's repositories were saved with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers


WIDTH = 32
PATCH = 8
NATIVE = (4, 4)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]

VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": NATIVE[0] * PATCH,
    "patch_size": PATCH,
}
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"}
NAFLEX = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
DECODER = {
    "decoder_hidden_size": WIDTH,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO),
    "dinov2_classifier": ("Dinov2ForImageClassification", "Dinov2Config", DINO),
    "dinov2_giant": ("Dinov2Model", "Dinov2Config", DINO | {"use_swiglu_ffn": True}),
    "webssl": ("Dinov2Model", "Dinov2Config", DINO | {"use_mask_token": False}),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        DINO | {"num_register_tokens": 3},
    ),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", VISION | {"num_register_tokens": 4}),
    "vit": ("ViTModel", "ViTConfig", VISION),
    "vit_mae": ("ViTMAEForPreTraining", "ViTMAEConfig", VISION | DECODER),
    "ijepa": ("IJepaModel", "IJepaConfig", VISION),
    "clip": ("CLIPModel", "CLIPConfig", {"vision_config": VISION, "text_config": TEXT, "projection_dim": 16}),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION),
    "siglip": ("SiglipModel", "SiglipConfig", {"vision_config": VISION, "text_config": TEXT}),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", VISION),
    "siglip2": ("Siglip2Model", "Siglip2Config", {"vision_config": NAFLEX, "text_config": TEXT}),
    "vit_msn": ("ViTMSNModel", "ViTMSNConfig", VISION),
    "deit": ("DeiTModel", "DeiTConfig", VISION),
    "metaclip_2": ("MetaClip2Model", "MetaClip2Config", {"vision_config": VISION, "text_config": TEXT}),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "image_size": 32, "patch_size": 4, "window_size": 4},
    ),
    "bert": ("BertModel", "BertConfig", {key: value for key, value in TEXT.items()}),
}


def build_model(kind: str) -> torch.nn.Module:
    """A model whose weights are large enough that every part of it shows in the output."""
    model_class, config_class, arguments = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def write_processor(folder: str | Path, **values: Any) -> None:
    processor = {
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor | values))
