"""From a configuration to the parts of aligned flow matching, every mismatch found before training starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.presets import default_depth
from diffusers_srepa.alignment.registry import build_projector
from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.configuration.sections import TeacherConfig
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import ConfigurationError, close_matches, in_options, one_line
from diffusers_srepa.hooks import block_list
from diffusers_srepa.latents.latent_space import LatentSpace
from diffusers_srepa.latents.loading import load_latent_space
from diffusers_srepa.models.loading import (
    PROJECTORS,
    find_folder,
    load_transformer,
    projector_names,
    read_transformer_config,
    read_weights,
)
from diffusers_srepa.models.presets import find_preset
from diffusers_srepa.teachers.auto_teacher import Teacher


logger = get_logger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SIZES = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio", "qk_norm")


_LATENTS_OPTIONS = {"name_or_path": "latents.vae", "subfolder": "latents.subfolder", "revision": "latents.revision"}


def build_latent_space(config: TrainingConfig) -> LatentSpace:
    """The latent space that `latents.vae` names.

    Raises:
        ConfigurationError: it cannot be loaded, or the resolution is no multiple of its down-sampling.
    """
    latents = config.latents
    with in_options(_LATENTS_OPTIONS):
        space = load_latent_space(
            latents.vae, subfolder=latents.subfolder, revision=latents.revision, dtype=_DTYPES[latents.dtype]
        )
    if config.data.resolution % space.downsample_factor:
        raise ConfigurationError(
            f"data.resolution is {config.data.resolution}, which is no multiple of {space.downsample_factor}, the "
            f"down-sampling of {latents.vae}: change data.resolution or latents.vae."
        )
    return space


def resolve_num_classes(config: TrainingConfig, found: int | None) -> int:
    """The number of classes of the model: the configured one, else the dataset's.

    Raises:
        ConfigurationError: the dataset has more classes than `model.num_classes`, or tells none and none is given.
    """
    wanted = config.model.num_classes
    if wanted is None and found is None:
        raise ConfigurationError(
            f"the dataset {config.data.dataset} does not say how many classes it has: set model.num_classes."
        )
    if wanted is not None and found is not None and found > wanted:
        raise ConfigurationError(
            f"the dataset {config.data.dataset} has labels up to {found - 1}, but model.num_classes is {wanted}: "
            f"set model.num_classes to at least {found}, or leave it out."
        )
    return int(wanted if wanted is not None else found)  # type: ignore[arg-type]


def teacher_settings(config: TrainingConfig, name: str) -> TeacherConfig:
    """The options of the teacher called `name`, which terms have as their `target`.

    Raises:
        ConfigurationError: there is no such teacher.
    """
    known = {DEFAULT: config.teacher, **config.teachers}
    if name not in known:
        raise ConfigurationError(
            f"an alignment term names the teacher {name!r}, {close_matches(name, known)} (section teachers)."
        )
    return known[name]


def build_teacher(config: TrainingConfig, name: str, student_grid: tuple[int, int]) -> Teacher:
    """The frozen encoder called `name`, its grid checked against the student's.

    Raises:
        ConfigurationError: the grids differ and `resample` is not set, or a class token is needed and missing.
    """
    settings = teacher_settings(config, name)
    section = "teacher" if name == DEFAULT else f"teachers.{name}"
    usual = max(config.data.resolution // 16, 1)
    grid = settings.grid or (max(student_grid[0], usual), max(student_grid[1], usual))
    if tuple(grid) != student_grid and settings.resample is None:
        raise ConfigurationError(
            f"the teacher's grid is {grid[0]} x {grid[1]} tokens, the student's {student_grid[0]} x {student_grid[1]}"
            f": set {section}.grid to the student's, or {section}.resample to area or bilinear."
        )
    arguments = ("name_or_path", "grid", "layer", "subfolder", "revision", "resample")
    with in_options({argument: f"{section}.{argument}" for argument in arguments}):
        teacher = Teacher.from_pretrained(
            settings.name_or_path,
            grid=(grid[0], grid[1]),
            layer=settings.layer,
            subfolder=settings.subfolder,
            revision=settings.revision,
        )
    if name == DEFAULT and config.alignment.class_token_weight is not None and not teacher.has_class_token:
        raise ConfigurationError(
            f"{config.alignment.preset} denoises the teacher's class token, but {settings.name_or_path} has none: "
            "change teacher.name_or_path or alignment.preset."
        )
    return teacher


def student_patch_size(config: TrainingConfig, transformer: Any = None) -> int:
    """Latent pixels per token and side: of the given model or the one that is continued, else of the configured size.

    Raises:
        ConfigurationError: an unknown model preset, or nothing to load at `model.init_from`.
    """
    if transformer is not None:
        return int(transformer.config.patch_size)
    model = config.model
    if model.init_from is not None:
        with in_options({"source": "model.init_from"}):
            return int(read_transformer_config(model.init_from)["patch_size"])
    _, sizes = _find_preset(config)
    return int(model.patch_size or sizes["patch_size"])


def _find_preset(config: TrainingConfig) -> tuple[Any, dict[str, Any]]:
    with in_options({"preset": "model.preset"}):
        return find_preset(config.model.preset)


def token_grid(config: TrainingConfig, latent_space: LatentSpace, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the student's tokens at the training resolution.

    Raises:
        ConfigurationError: the latent is no multiple of the patch size.
    """
    side = config.data.resolution // latent_space.downsample_factor
    if side % patch_size:
        raise ConfigurationError(
            f"latents of {side} x {side} cannot be cut into patches of {patch_size}: change data.resolution or "
            "model.patch_size."
        )
    return side // patch_size, side // patch_size


def build_transformer(
    config: TrainingConfig,
    latent_space: LatentSpace,
    num_classes: int,
    teacher: Teacher | None,
    given: Any = None,
) -> Any:
    """The given transformer, that of `model.init_from`, or a freshly initialised one of `model.preset`.

    Raises:
        ConfigurationError: sizes that do not fit together, or a loaded or given model that does not fit.
    """
    model = config.model
    required: dict[str, Any] = {
        "in_channels": latent_space.latent_channels,
        "num_classes": num_classes,
        "sample_size": config.data.resolution // latent_space.downsample_factor,
    }
    # REG denoises the teacher's class token.
    if config.alignment.class_token_weight is not None and teacher is not None:
        required["class_token_dim"] = teacher.feature_dim
    if given is not None:
        _check_fits(given.config, required, "the given transformer")
        return given
    chosen = {name: getattr(model, name) for name in _SIZES if getattr(model, name) is not None}
    if model.init_from is not None:
        return _continue_transformer(str(model.init_from), required, chosen)
    transformer_class, sizes = _find_preset(config)
    try:
        return transformer_class(**sizes | required | {"class_dropout_prob": model.class_dropout_prob} | chosen)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"section model cannot be built: {one_line(error)}.") from None


def _check_fits(saved: Mapping[str, Any], needed: Mapping[str, Any], described: str) -> None:
    for name, value in {"class_token_dim": None, **needed}.items():
        if saved.get(name) != value:
            raise ConfigurationError(
                f"{described} has {name} {saved.get(name)}, but this run needs {value}: change model.init_from, the "
                "option model or alignment.preset, the dataset or latents.vae."
            )


def _continue_transformer(source: str, required: dict[str, Any], chosen: dict[str, Any]) -> Any:
    """The transformer of `model.init_from`, with the native size of this run's latents."""
    size = required.pop("sample_size")
    with in_options({"source": "model.init_from"}):
        saved = read_transformer_config(source)
        _check_fits(saved, {**required, **chosen}, f"the transformer of model.init_from {source}")
        return load_transformer(source, sample_size=size)


def _check_compiler() -> None:
    """Refuse `model.compile` where only a C++ compiler could do it and there is none.

    Raises:
        ConfigurationError: no GPU and no compiler.
    """
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in ("g++", "clang++", "icpx", "cl")):
        raise ConfigurationError(
            "model.compile needs a C++ compiler on the CPU, and none was found: install one, or unset model.compile."
        )


def build_student(
    config: TrainingConfig,
    transformer: Any,
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
        with in_options({"source": "model.init_from"}):
            _continue_projectors(student, str(config.model.init_from))
    return student


def _continue_projectors(student: AlignedDenoiser, source: str) -> None:
    folder = find_folder(source)
    if not projector_names(folder):
        return
    student.load_projectors(folder / PROJECTORS)
    for name, projector in student.projectors.items():
        # Their averages, which a checkpoint of the first format has elsewhere.
        projector.load_state_dict(read_weights(folder, f"{PROJECTORS}/{name}"))
    logger.info(f"projectors continue from {folder / PROJECTORS}")


def build_projectors(
    config: TrainingConfig,
    transformer: Any,
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


def known_taps(config: TrainingConfig, transformer: Any) -> dict[str, int | str]:
    """Depth, counted from 1, or module path of every tap by name."""
    alignment = config.alignment
    default = alignment.tap or alignment.depth
    if default is None:
        with in_options({"tap": "alignment.tap"}):
            default = default_depth(len(block_list(transformer)[1]), transformer.inner_dim)
    return {DEFAULT: default, **alignment.taps}


def resolve_tap(config: TrainingConfig, name: str, transformer: Any) -> str:
    """The dotted path of the module that the tap called `name` reads.

    Raises:
        ConfigurationError: there is no such tap, or its depth is outside the transformer's blocks.
    """
    known = known_taps(config, transformer)
    if name not in known:
        raise ConfigurationError(
            f"an alignment term names the tap {name!r}, {close_matches(name, known)} (alignment.taps)."
        )
    where = known[name]
    if isinstance(where, str):
        return where
    blocks, modules = block_list(transformer)
    option = "alignment.depth" if name == DEFAULT else f"alignment.taps.{name}"
    if not isinstance(where, int) or not 1 <= where <= len(modules):
        raise ConfigurationError(
            f"{option} is {where}, but the transformer has blocks 1 to {len(modules)}: change {option}."
        )
    logger.info(f"alignment taps the output of block {where} of {len(modules)}")
    return f"{blocks}.{where - 1}"
