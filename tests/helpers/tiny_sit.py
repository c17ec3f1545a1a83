"""A SiT of two blocks with weights that are all non-zero, and inputs for it.

A new SiT returns exactly zero, whatever its input: adapters, caches and compilers could do anything to it unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch

from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel


TINY_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 10,
}


def tiny_sit(seed: int = 0, **config: Any) -> SiTTransformer2DModel:
    """A two-block SiT, width 16, for latents `(B, 4, 8, 8)`, in eval mode; `config` overrides `TINY_CONFIG`."""
    model = SiTTransformer2DModel(**{**TINY_CONFIG, **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_inputs(
    batch_size: int = 2, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Latents, timesteps and labels for `tiny_sit`, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, 4, *size, generator=generator).to(dtype),
        "timestep": 1000 * torch.rand(batch_size, generator=generator),
        "class_labels": torch.randint(0, 10, (batch_size,), generator=generator),
    }
