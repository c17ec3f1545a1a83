"""A whole training run of tiny real parts: an AutoencoderKL, a Dinov2Model and a folder of pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model


CLASSES = ("cat", "dog", "newt")
IMAGES_PER_CLASS = 8
RESOLUTION = 16


def write_vae(folder: Path) -> None:
    """A two-level autoencoder with down-sampling 2 and four latent channels: 16 pixels become 8 x 8 latents."""
    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.7,
        sample_size=RESOLUTION,
    ).save_pretrained(folder)


def write_teacher(folder: Path) -> None:
    """A two-block DINOv2 with a native grid of 4 x 4 patches of 7 pixels."""
    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """A two-block CLIP vision tower, wider than the DINOv2 and with another patch size."""
    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)


def write_images(folder: Path) -> None:
    """An image folder with one subfolder per class; the pictures are bigger than the crops and of different shapes."""
    generator = np.random.default_rng(3)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(IMAGES_PER_CLASS):
            shape = (20 + index, 24, 3)
            pixels = generator.integers(0, 128, shape) + 60 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")


def write_assets(folder: Path) -> Path:
    """All parts of a run below `folder`, and `config.yaml` that names them by absolute paths."""
    write_vae(folder / "vae")
    write_teacher(folder / "teacher")
    write_images(folder / "images")
    config: dict[str, Any] = {
        "model": {"preset": "SiT-S/2", "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12},
        "latents": {"vae": str(folder / "vae")},
        "teacher": {"name_or_path": str(folder / "teacher")},
        "alignment": {"projector": {"name": "mlp", "hidden_dim": 16}},
        "data": {"dataset": str(folder / "images"), "resolution": RESOLUTION, "num_workers": 0},
        "optimizer": {"lr": 1e-3},
        "training": {
            "max_steps": 4,
            "global_batch_size": 8,
            "mixed_precision": "no",
            "ema_decay": 0.5,
            "log_every": 1,
        },
        "sampling": {"scheduler": "euler", "num_inference_steps": 3, "guidance_scale": 1.5},
        "validation": {"every": 0, "num_images": 4},
        "checkpoints": {"every": 2},
        "tracking": {"report_to": "none"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder
