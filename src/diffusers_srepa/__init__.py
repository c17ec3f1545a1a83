"""Structural representation alignment (sREPA) for diffusion transformers, in the forms of the HuggingFace ecosystem.

The public names below load on first use, so that `import diffusers_srepa` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_PUBLIC = {
    "AlignedDenoiser": "alignment.aligned_denoiser",
    "AlignmentLoss": "alignment.loss",
    "AlignmentObjective": "alignment.objectives.base",
    "AlignmentTerm": "alignment.term",
    "AutoencoderKLCodec": "latents.autoencoder_kl",
    "ConvProjector": "alignment.projectors",
    "CosineAlignment": "alignment.objectives.cosine",
    "CosineInterpolant": "interpolant",
    "FeatureTap": "alignment.feature_tap",
    "FlowMatchEulerMaruyamaScheduler": "schedulers.scheduling_flow_match_euler_maruyama",
    "GramKLAlignment": "alignment.objectives.gram_kl",
    "GramMSEAlignment": "alignment.objectives.gram_mse",
    "LinearInterpolant": "interpolant",
    "LinearProjector": "alignment.projectors",
    "MLPProjector": "alignment.projectors",
    "PixelCodec": "latents.pixels",
    "SiTPipeline": "pipelines.pipeline_sit",
    "SiTTransformer2DModel": "models.transformer_sit",
    "SpatialNorm": "alignment.spatial_norm",
    "Tap": "alignment.term",
    "Teacher": "teachers.auto_teacher",
    "TeacherFeatures": "tokens",
    "TokenMap": "tokens",
    "Trainer": "training.trainer",
    "TrainingConfig": "training.config",
    "gram_kl_loss": "alignment.objectives.gram_kl",
    "gram_mse_loss": "alignment.objectives.gram_mse",
    "parse_training_config": "training.command_line",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    # The same names for type checkers and editors.
    pass
