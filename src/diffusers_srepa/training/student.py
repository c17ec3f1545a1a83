"""The student of a run: its transformer, new or loaded, with taps and projectors around it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from huggingface_hub import snapshot_download
from torch import nn

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.build import build_projector
from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.presets import default_depth
from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.errors import ConfigurationError, close_matches
from diffusers_srepa.latents.latent_space import LatentSpace
from diffusers_srepa.models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from diffusers_srepa.teachers.auto_teacher import Teacher
from diffusers_srepa.training.config import TrainingConfig


logger = get_logger(__name__)

_SIZES = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio", "qk_norm")


def student_patch_size(config: TrainingConfig) -> int:
    """Latent pixels per token and side: of the model that is continued, else of the configured size.

    Raises:
        ConfigurationError: an unknown model preset, or nothing to load at `model.init_from`.
    """
    model = config.model
    if model.init_from is not None:
        return int(_read_transformer_config(model.init_from)["patch_size"])
    if model.preset not in SIT_PRESETS:
        raise ConfigurationError(
            f"there is no model preset {model.preset!r}, {close_matches(model.preset, SIT_PRESETS)} "
            "(option model.preset)."
        )
    return model.patch_size or SIT_PRESETS[model.preset]["patch_size"]


def token_grid(config: TrainingConfig, codec: LatentSpace, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the student's tokens at the training resolution.

    Raises:
        ConfigurationError: the latent is no multiple of the patch size.
    """
    side = config.data.resolution // codec.downsample_factor
    if side % patch_size:
        raise ConfigurationError(
            f"latents of {side} x {side} cannot be cut into patches of {patch_size}: change data.resolution or "
            "model.patch_size."
        )
    return side // patch_size, side // patch_size


def build_transformer(
    config: TrainingConfig, codec: LatentSpace, num_classes: int, teacher: Teacher | None
) -> SiTTransformer2DModel:
    """A freshly initialised SiT, or the one of `model.init_from`, with a class token where REG needs one.

    Raises:
        ConfigurationError: sizes that do not fit together, or a loaded model that does not fit.
    """
    model = config.model
    class_token_dim = None
    if config.alignment.class_token_weight is not None and teacher is not None:
        class_token_dim = teacher.feature_dim
    if model.init_from is not None:
        required = {
            "in_channels": codec.latent_channels,
            "num_classes": num_classes,
            "class_token_dim": class_token_dim,
            "sample_size": config.data.resolution // codec.downsample_factor,
        }
        return _load_transformer(config, required)
    overrides = {name: getattr(model, name) for name in _SIZES if getattr(model, name) is not None}
    try:
        return SiTTransformer2DModel.from_preset(
            model.preset,
            sample_size=config.data.resolution // codec.downsample_factor,
            in_channels=codec.latent_channels,
            num_classes=num_classes,
            class_dropout_prob=model.class_dropout_prob,
            class_token_dim=class_token_dim,
            **overrides,
        )
    except ValueError as error:
        raise ConfigurationError(f"section model cannot be built: {error}") from None


def _read_transformer_config(source: str) -> dict[str, Any]:
    try:
        config = dict(SiTTransformer2DModel.load_config(source, subfolder="transformer"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"model.init_from {source} holds no SiT transformer: {reason}") from None
    if config.get("_class_name") != SiTTransformer2DModel.__name__:
        raise ConfigurationError(
            f"model.init_from {source} holds a {config.get('_class_name')}, not a SiT transformer."
        )
    return config


def _load_transformer(config: TrainingConfig, required: dict[str, int | None]) -> SiTTransformer2DModel:
    """The transformer of `model.init_from`, with the native size of this run's latents."""
    source = str(config.model.init_from)
    saved = _read_transformer_config(source)
    wanted = {name: getattr(config.model, name) for name in _SIZES if getattr(config.model, name) is not None}
    for name, value in {**required, **wanted}.items():
        if name != "sample_size" and saved.get(name) != value:
            raise ConfigurationError(
                f"the transformer of model.init_from {source} has {name} {saved.get(name)}, but this run needs {value}"
                ": change model.init_from, the option model or alignment.preset, the dataset or latents.vae."
            )
    try:
        loaded = SiTTransformer2DModel.from_pretrained(source, subfolder="transformer")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"the transformer of model.init_from {source} cannot be loaded: {reason}") from None
    if saved.get("sample_size") == required["sample_size"]:
        return loaded
    # Another resolution has another native grid; all weights are the same, only the table of positions differs.
    resized = SiTTransformer2DModel.from_config({**saved, "sample_size": required["sample_size"]})
    weights = {name: value for name, value in loaded.state_dict().items() if name != "pos_embed"}
    resized.load_state_dict(weights, strict=False)
    return resized


def _check_compiler() -> None:
    """Refuse `model.compile` where only a C++ compiler could do it and there is none.

    Raises:
        ConfigurationError: no GPU and no compiler.
    """
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in ("g++", "clang++", "icpx", "cl")):
        raise ConfigurationError(
            "model.compile needs a C++ compiler on the CPU, and none was found: install one, or unset model.compile."
        )


def _projector_folder(source: str) -> Path:
    """The folder of projectors of a pipeline, fetched if the pipeline is on the Hub; it may not exist."""
    if Path(source).is_dir():
        return Path(source) / "projectors"
    return Path(snapshot_download(source, allow_patterns=["projectors/*"])) / "projectors"


def build_student(
    config: TrainingConfig,
    transformer: SiTTransformer2DModel,
    teachers: Mapping[str, Teacher],
    criterion: AlignmentLoss,
) -> AlignedDenoiser:
    """Transformer, taps and projectors as one trainable module.

    Raises:
        ConfigurationError: a depth outside the blocks, an unknown tap or projector, or one projector for two widths.
    """
    if config.model.compile:
        _check_compiler()
    if config.model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    features = criterion.features()
    if not features:
        return AlignedDenoiser(transformer, tap={}, projector={})
    taps = {name: resolve_tap(config, name, transformer) for name in sorted({tap for tap, _ in features})}
    projectors = build_projectors(config, transformer, teachers, criterion)
    student = AlignedDenoiser(transformer, taps, projectors or None, features)
    if config.model.init_from is not None and projectors:
        saved = _projector_folder(config.model.init_from)
        if saved.is_dir():
            student.load_projectors(saved)
            logger.info(f"projectors continue from {saved}")
    return student


def build_projectors(
    config: TrainingConfig,
    transformer: SiTTransformer2DModel,
    teachers: Mapping[str, Teacher],
    criterion: AlignmentLoss,
) -> dict[str, nn.Module]:
    """One projector per name that the terms use, from the student's width to that of the teacher they compare with.

    Without any teacher there is nothing to project to, and the student's tokens stay as they are.

    Raises:
        ConfigurationError: an unknown projector, or one projector for teachers of different widths.
    """
    alignment = config.alignment
    projectors: dict[str, nn.Module] = {}
    for name in sorted({projector for _, projector in criterion.features() if projector is not None}):
        users = [term for term in criterion.active_terms().values() if term.projector == name]
        widths = {teachers[term.teacher].feature_dim for term in users if term.teacher is not None}
        if len(widths) > 1:
            raise ConfigurationError(
                f"the projector {name!r} would lead to teachers of widths {sorted(widths)}: give each term a "
                "`projector` name of its own."
            )
        literal = alignment.projectors.get(name, alignment.projector)
        if widths and literal is not None:
            projectors[name] = build_projector(literal, transformer.inner_dim, widths.pop())
    return projectors


def resolve_tap(config: TrainingConfig, name: str, transformer: SiTTransformer2DModel) -> str:
    """The dotted path of the module that the tap called `name` reads.

    Raises:
        ConfigurationError: there is no such tap, or its depth is outside the transformer's blocks.
    """
    alignment = config.alignment
    num_layers = len(transformer.transformer_blocks)
    known = {
        DEFAULT: alignment.tap or alignment.depth or default_depth(num_layers, transformer.inner_dim),
        **alignment.taps,
    }
    if name not in known:
        raise ConfigurationError(
            f"an alignment term names the tap {name!r}, {close_matches(name, known)} (alignment.taps)."
        )
    where = known[name]
    if isinstance(where, str):
        return where
    option = "alignment.depth" if name == DEFAULT else f"alignment.taps.{name}"
    if not isinstance(where, int) or not 1 <= where <= num_layers:
        raise ConfigurationError(
            f"{option} is {where}, but the transformer has blocks 1 to {num_layers}: change {option}."
        )
    logger.info(f"alignment taps the output of block {where} of {num_layers}")
    return f"transformer_blocks.{where - 1}"
