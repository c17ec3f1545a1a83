"""A small AutoencoderKL with random weights: factor 4, 4 latent channels."""

import torch
from diffusers import AutoencoderKL


def tiny_autoencoder(seed: int = 0, **config) -> AutoencoderKL:
    torch.manual_seed(seed)
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**settings | config)
