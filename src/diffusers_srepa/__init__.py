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
    "AlignmentOutput": "alignment.loss",
    "AlignmentTerm": "alignment.term",
    "AutoencoderKLCodec": "latents.autoencoder_kl",
    "BatchCKAAlignment": "alignment.objectives.cka",
    "CKAAlignment": "alignment.objectives.cka",
    "ConfigurationError": "errors",
    "Constant": "alignment.schedule",
    "ConvProjector": "alignment.projectors",
    "CosineAlignment": "alignment.objectives.cosine",
    "CosineDecay": "alignment.schedule",
    "CosineInterpolant": "interpolant",
    "DataError": "errors",
    "DispersiveAlignment": "alignment.objectives.dispersive",
    "DistanceMarginAlignment": "alignment.objectives.distance_margin",
    "FeatureTap": "alignment.feature_tap",
    "FlowMatchEulerMaruyamaScheduler": "schedulers.scheduling_flow_match_euler_maruyama",
    "GramKLAlignment": "alignment.objectives.gram_kl",
    "GramMSEAlignment": "alignment.objectives.gram_mse",
    "HardStop": "alignment.schedule",
    "LayerSyncAlignment": "alignment.objectives.layer_sync",
    "LinearDecay": "alignment.schedule",
    "LinearInterpolant": "interpolant",
    "LinearProjector": "alignment.projectors",
    "MLPProjector": "alignment.projectors",
    "PixelCodec": "latents.pixels",
    "PositiveGramAlignment": "alignment.objectives.positive_gram",
    "Product": "alignment.schedule",
    "RKDDistanceAlignment": "alignment.objectives.rkd_distance",
    "Schedule": "alignment.schedule",
    "SiTPipeline": "pipelines.pipeline_sit",
    "SiTTransformer2DModel": "models.transformer_sit",
    "SimilarityPreservingAlignment": "alignment.objectives.similarity_preserving",
    "SpatialNorm": "alignment.spatial_norm",
    "Tap": "alignment.term",
    "Teacher": "teachers.auto_teacher",
    "TeacherFeatures": "tokens",
    "TokenMap": "tokens",
    "Trainer": "training.trainer",
    "TrainingConfig": "training.config",
    "TrainingInterrupted": "training.interruption",
    "WarmUp": "alignment.schedule",
    "convert_checkpoint": "conversion.convert",
    "export_checkpoint": "conversion.export",
    "gram_kl_loss": "alignment.structural.exact",
    "gram_mse_loss": "alignment.structural.exact",
    "parse_training_config": "training.command_line",
    "set_up_console": "training.console",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    # The same names, for type checkers and editors.
    from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser as AlignedDenoiser
    from diffusers_srepa.alignment.feature_tap import FeatureTap as FeatureTap
    from diffusers_srepa.alignment.loss import AlignmentLoss as AlignmentLoss
    from diffusers_srepa.alignment.loss import AlignmentOutput as AlignmentOutput
    from diffusers_srepa.alignment.objectives.base import AlignmentObjective as AlignmentObjective
    from diffusers_srepa.alignment.objectives.cka import BatchCKAAlignment as BatchCKAAlignment
    from diffusers_srepa.alignment.objectives.cka import CKAAlignment as CKAAlignment
    from diffusers_srepa.alignment.objectives.cosine import CosineAlignment as CosineAlignment
    from diffusers_srepa.alignment.objectives.dispersive import DispersiveAlignment as DispersiveAlignment
    from diffusers_srepa.alignment.objectives.distance_margin import DistanceMarginAlignment as DistanceMarginAlignment
    from diffusers_srepa.alignment.objectives.gram_kl import GramKLAlignment as GramKLAlignment
    from diffusers_srepa.alignment.objectives.gram_mse import GramMSEAlignment as GramMSEAlignment
    from diffusers_srepa.alignment.objectives.layer_sync import LayerSyncAlignment as LayerSyncAlignment
    from diffusers_srepa.alignment.objectives.positive_gram import PositiveGramAlignment as PositiveGramAlignment
    from diffusers_srepa.alignment.objectives.rkd_distance import RKDDistanceAlignment as RKDDistanceAlignment
    from diffusers_srepa.alignment.objectives.similarity_preserving import (
        SimilarityPreservingAlignment as SimilarityPreservingAlignment,
    )
    from diffusers_srepa.alignment.projectors import ConvProjector as ConvProjector
    from diffusers_srepa.alignment.projectors import LinearProjector as LinearProjector
    from diffusers_srepa.alignment.projectors import MLPProjector as MLPProjector
    from diffusers_srepa.alignment.schedule import Constant as Constant
    from diffusers_srepa.alignment.schedule import CosineDecay as CosineDecay
    from diffusers_srepa.alignment.schedule import HardStop as HardStop
    from diffusers_srepa.alignment.schedule import LinearDecay as LinearDecay
    from diffusers_srepa.alignment.schedule import Product as Product
    from diffusers_srepa.alignment.schedule import Schedule as Schedule
    from diffusers_srepa.alignment.schedule import WarmUp as WarmUp
    from diffusers_srepa.alignment.spatial_norm import SpatialNorm as SpatialNorm
    from diffusers_srepa.alignment.structural.exact import gram_kl_loss as gram_kl_loss
    from diffusers_srepa.alignment.structural.exact import gram_mse_loss as gram_mse_loss
    from diffusers_srepa.alignment.term import AlignmentTerm as AlignmentTerm
    from diffusers_srepa.alignment.term import Tap as Tap
    from diffusers_srepa.conversion.convert import convert_checkpoint as convert_checkpoint
    from diffusers_srepa.conversion.export import export_checkpoint as export_checkpoint
    from diffusers_srepa.errors import ConfigurationError as ConfigurationError
    from diffusers_srepa.errors import DataError as DataError
    from diffusers_srepa.interpolant import CosineInterpolant as CosineInterpolant
    from diffusers_srepa.interpolant import LinearInterpolant as LinearInterpolant
    from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLCodec as AutoencoderKLCodec
    from diffusers_srepa.latents.pixels import PixelCodec as PixelCodec
    from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel as SiTTransformer2DModel
    from diffusers_srepa.pipelines.pipeline_sit import SiTPipeline as SiTPipeline
    from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import (
        FlowMatchEulerMaruyamaScheduler as FlowMatchEulerMaruyamaScheduler,
    )
    from diffusers_srepa.teachers.auto_teacher import Teacher as Teacher
    from diffusers_srepa.tokens import TeacherFeatures as TeacherFeatures
    from diffusers_srepa.tokens import TokenMap as TokenMap
    from diffusers_srepa.training.command_line import parse_training_config as parse_training_config
    from diffusers_srepa.training.config import TrainingConfig as TrainingConfig
    from diffusers_srepa.training.console import set_up_console as set_up_console
    from diffusers_srepa.training.interruption import TrainingInterrupted as TrainingInterrupted
    from diffusers_srepa.training.trainer import Trainer as Trainer
