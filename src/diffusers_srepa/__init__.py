"""Structural representation alignment (sREPA) for diffusion transformers, in the forms of the HuggingFace ecosystem.

The public names below load on first use, so that `import diffusers_srepa` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_PUBLIC = {
    "AlignedDenoiser": "alignment.aligned_denoiser",
    "AlignedFlowMatching": "training.methods.aligned_flow_matching",
    "AlignmentLoss": "alignment.loss",
    "AlignmentObjective": "alignment.objectives.base",
    "AlignmentOutput": "alignment.loss",
    "AlignmentTerm": "alignment.term",
    "AutoencoderKLLatents": "latents.autoencoder_kl",
    "BatchCKAAlignment": "alignment.objectives.batch",
    "CKAAlignment": "alignment.objectives.relational",
    "ConfigurationError": "errors",
    "Constant": "alignment.schedule",
    "ConvProjector": "alignment.projectors",
    "CosineAlignment": "alignment.objectives.pointwise",
    "CosineDecay": "alignment.schedule",
    "CosineInterpolant": "interpolant",
    "DataError": "errors",
    "DispersiveAlignment": "alignment.objectives.batch",
    "DistanceMarginAlignment": "alignment.objectives.relational",
    "FeatureTap": "hooks",
    "FlowMatchEulerMaruyamaScheduler": "schedulers.scheduling_flow_match_euler_maruyama",
    "GramKLAlignment": "alignment.objectives.relational",
    "GramMSEAlignment": "alignment.objectives.relational",
    "HardStop": "alignment.schedule",
    "LayerSyncAlignment": "alignment.objectives.pointwise",
    "LinearDecay": "alignment.schedule",
    "LinearInterpolant": "interpolant",
    "LinearProjector": "alignment.projectors",
    "LossOutput": "training.method",
    "MLPProjector": "alignment.projectors",
    "Phase": "training.method",
    "PixelLatents": "latents.pixels",
    "PositiveGramAlignment": "alignment.objectives.relational",
    "Product": "alignment.schedule",
    "RKDDistanceAlignment": "alignment.objectives.relational",
    "RunConfig": "configuration.training",
    "Schedule": "alignment.schedule",
    "SiTPipeline": "pipelines.hub",
    "SiTTransformer2DModel": "models.transformer_sit",
    "SimilarityPreservingAlignment": "alignment.objectives.batch",
    "SpatialNorm": "alignment.spatial_norm",
    "StepContext": "training.method",
    "Tap": "alignment.term",
    "Teacher": "teachers.auto_teacher",
    "TeacherFeatures": "tokens",
    "TokenMap": "tokens",
    "Trainer": "training.trainer",
    "TrainerCallback": "training.callbacks",
    "TrainingConfig": "configuration.training",
    "TrainingInterrupted": "training.signals",
    "TrainingMethod": "training.method",
    "WarmUp": "alignment.schedule",
    "convert_checkpoint": "conversion.convert",
    "export_checkpoint": "conversion.export",
    "gram_kl_loss": "alignment.gram.losses",
    "gram_mse_loss": "alignment.gram.losses",
    "load_training_config": "configuration.command_line",
    "parse_training_config": "cli.train",
    "register_transformer": "models.presets",
    "set_up_console": "training.logging",
    "training_exit_codes": "cli.train",
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
    from diffusers_srepa.alignment.gram.losses import gram_kl_loss as gram_kl_loss
    from diffusers_srepa.alignment.gram.losses import gram_mse_loss as gram_mse_loss
    from diffusers_srepa.alignment.loss import AlignmentLoss as AlignmentLoss
    from diffusers_srepa.alignment.loss import AlignmentOutput as AlignmentOutput
    from diffusers_srepa.alignment.objectives.base import AlignmentObjective as AlignmentObjective
    from diffusers_srepa.alignment.objectives.batch import BatchCKAAlignment as BatchCKAAlignment
    from diffusers_srepa.alignment.objectives.batch import DispersiveAlignment as DispersiveAlignment
    from diffusers_srepa.alignment.objectives.batch import (
        SimilarityPreservingAlignment as SimilarityPreservingAlignment,
    )
    from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment as CosineAlignment
    from diffusers_srepa.alignment.objectives.pointwise import LayerSyncAlignment as LayerSyncAlignment
    from diffusers_srepa.alignment.objectives.relational import CKAAlignment as CKAAlignment
    from diffusers_srepa.alignment.objectives.relational import DistanceMarginAlignment as DistanceMarginAlignment
    from diffusers_srepa.alignment.objectives.relational import GramKLAlignment as GramKLAlignment
    from diffusers_srepa.alignment.objectives.relational import GramMSEAlignment as GramMSEAlignment
    from diffusers_srepa.alignment.objectives.relational import PositiveGramAlignment as PositiveGramAlignment
    from diffusers_srepa.alignment.objectives.relational import RKDDistanceAlignment as RKDDistanceAlignment
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
    from diffusers_srepa.alignment.term import AlignmentTerm as AlignmentTerm
    from diffusers_srepa.alignment.term import Tap as Tap
    from diffusers_srepa.cli.train import parse_training_config as parse_training_config
    from diffusers_srepa.cli.train import training_exit_codes as training_exit_codes
    from diffusers_srepa.configuration.command_line import load_training_config as load_training_config
    from diffusers_srepa.configuration.training import RunConfig as RunConfig
    from diffusers_srepa.configuration.training import TrainingConfig as TrainingConfig
    from diffusers_srepa.conversion.convert import convert_checkpoint as convert_checkpoint
    from diffusers_srepa.conversion.export import export_checkpoint as export_checkpoint
    from diffusers_srepa.errors import ConfigurationError as ConfigurationError
    from diffusers_srepa.errors import DataError as DataError
    from diffusers_srepa.hooks import FeatureTap as FeatureTap
    from diffusers_srepa.interpolant import CosineInterpolant as CosineInterpolant
    from diffusers_srepa.interpolant import LinearInterpolant as LinearInterpolant
    from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents as AutoencoderKLLatents
    from diffusers_srepa.latents.pixels import PixelLatents as PixelLatents
    from diffusers_srepa.models.presets import register_transformer as register_transformer
    from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel as SiTTransformer2DModel
    from diffusers_srepa.pipelines.hub import SiTPipeline as SiTPipeline
    from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import (
        FlowMatchEulerMaruyamaScheduler as FlowMatchEulerMaruyamaScheduler,
    )
    from diffusers_srepa.teachers.auto_teacher import Teacher as Teacher
    from diffusers_srepa.tokens import TeacherFeatures as TeacherFeatures
    from diffusers_srepa.tokens import TokenMap as TokenMap
    from diffusers_srepa.training.callbacks import TrainerCallback as TrainerCallback
    from diffusers_srepa.training.logging import set_up_console as set_up_console
    from diffusers_srepa.training.method import LossOutput as LossOutput
    from diffusers_srepa.training.method import Phase as Phase
    from diffusers_srepa.training.method import StepContext as StepContext
    from diffusers_srepa.training.method import TrainingMethod as TrainingMethod
    from diffusers_srepa.training.methods.aligned_flow_matching import AlignedFlowMatching as AlignedFlowMatching
    from diffusers_srepa.training.signals import TrainingInterrupted as TrainingInterrupted
    from diffusers_srepa.training.trainer import Trainer as Trainer
