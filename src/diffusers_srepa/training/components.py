"""From a configuration to the parts of a run, every mismatch found before training starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import IterableDataset

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.build import build_projector, build_terms
from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.presets import default_depth
from diffusers_srepa.data.datasets import load_image_dataset
from diffusers_srepa.data.order import GlobalBatchSampler
from diffusers_srepa.errors import ConfigurationError, close_matches
from diffusers_srepa.latents.build import load_codec
from diffusers_srepa.latents.codec import LatentCodec
from diffusers_srepa.models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from diffusers_srepa.teachers.auto_teacher import Teacher
from diffusers_srepa.training.config import TrainingConfig


logger = get_logger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Components:
    """The parts of a run, on the CPU and not yet wrapped.

    Args:
        dataset: Map-style or streaming dataset of training items.
        id2label: Class names by index, if the dataset has them.
        codec: Images to latents and back.
        teacher: Frozen encoder; None when no term needs one.
        transformer: The student's transformer.
        student: Transformer, tap and projectors as one trainable module.
        criterion: The alignment terms.
        student_grid: Token grid of the student.
    """

    dataset: Any
    id2label: dict[int, str] | None
    codec: LatentCodec
    teacher: Teacher | None
    transformer: SiTTransformer2DModel
    student: AlignedDenoiser
    criterion: AlignmentLoss
    student_grid: tuple[int, int]


def build_components(config: TrainingConfig, accelerator: Accelerator) -> Components:
    """Load and build everything that `config` names.

    Raises:
        ConfigurationError, DataError: what does not exist or does not fit, naming the option to change.
    """
    alignment = config.alignment
    criterion = AlignmentLoss(build_terms(alignment.terms, alignment.target_transform))
    needs_teacher = bool(criterion.teachers()) or alignment.class_token_weight is not None
    codec = build_codec(config)
    patch_size = student_patch_size(config)
    student_grid = token_grid(config, codec, patch_size)
    teacher = build_teacher(config, student_grid) if needs_teacher else None
    with accelerator.main_process_first():
        dataset = build_dataset(config, codec, needs_pixels=needs_teacher)
    num_classes = resolve_num_classes(config, dataset.num_classes)
    transformer = build_transformer(config, codec, num_classes, teacher)
    for term in criterion.terms.values():
        term.resample = term.resample or config.teacher.resample
    return Components(
        dataset=dataset,
        id2label=dataset.id2label,
        codec=codec,
        teacher=teacher,
        transformer=transformer,
        student=build_student(config, transformer, teacher, criterion),
        criterion=criterion,
        student_grid=student_grid,
    )


def build_codec(config: TrainingConfig) -> LatentCodec:
    """The codec that `latents.vae` names.

    Raises:
        ConfigurationError: it cannot be loaded, or the resolution is no multiple of its down-sampling.
    """
    latents = config.latents
    codec = load_codec(
        latents.vae, subfolder=latents.subfolder, revision=latents.revision, dtype=_DTYPES[latents.dtype]
    )
    if config.data.resolution % codec.downsample_factor:
        raise ConfigurationError(
            f"data.resolution is {config.data.resolution}, which is no multiple of {codec.downsample_factor}, the "
            f"down-sampling of {latents.vae}: change data.resolution or latents.vae."
        )
    return codec


def build_dataset(config: TrainingConfig, codec: LatentCodec, needs_pixels: bool) -> Any:
    """The training images, with moments from the latent cache if one is given."""
    data = config.data
    dataset = load_image_dataset(
        str(data.dataset),
        name=data.name,
        split=data.split,
        revision=data.revision,
        data_dir=data.data_dir,
        streaming=data.streaming,
        image_column=data.image_column,
        label_column=data.label_column,
        resolution=data.resolution,
        horizontal_flip=data.horizontal_flip,
        on_bad_image=data.on_bad_image,
        seed=config.seed,
        cache_dir=data.cache_dir,
        latent_cache=data.latent_cache,
        codec_id=codec.codec_id if data.latent_cache else None,
        need_pixels=needs_pixels or data.latent_cache is None,
    )
    if not isinstance(dataset, IterableDataset):
        # The sampler refuses a dataset that cannot fill one global batch; better now than at the first step.
        batch = config.training.global_batch_size
        GlobalBatchSampler(len(dataset), batch, batch, config.seed)
    return dataset


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


def token_grid(config: TrainingConfig, codec: LatentCodec, patch_size: int) -> tuple[int, int]:
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
    config: TrainingConfig, codec: LatentCodec, num_classes: int, teacher: Teacher | None
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
        }
        return _load_transformer(model.init_from, required)
    sizes = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio", "qk_norm")
    overrides = {name: getattr(model, name) for name in sizes if getattr(model, name) is not None}
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
        return dict(SiTTransformer2DModel.load_config(source, subfolder="transformer"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"model.init_from {source} holds no SiT transformer: {reason}") from None


def _load_transformer(source: str, required: dict[str, int | None]) -> SiTTransformer2DModel:
    try:
        transformer = SiTTransformer2DModel.from_pretrained(source, subfolder="transformer")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"the transformer of model.init_from {source} cannot be loaded: {reason}") from None
    for name, value in required.items():
        found = transformer.config.get(name)
        if found != value:
            raise ConfigurationError(
                f"the transformer of model.init_from {source} has {name} {found}, but this run needs {value}: "
                "change model.init_from, model.num_classes, alignment.preset, the dataset or latents.vae."
            )
    return transformer


def build_teacher(config: TrainingConfig, student_grid: tuple[int, int]) -> Teacher:
    """The frozen encoder, its grid checked against the student's.

    Raises:
        ConfigurationError: the grids differ and `teacher.resample` is not set, or a class token is needed and missing.
    """
    settings = config.teacher
    usual = max(config.data.resolution // 16, 1)
    grid = settings.grid or (max(student_grid[0], usual), max(student_grid[1], usual))
    if tuple(grid) != student_grid and settings.resample is None:
        raise ConfigurationError(
            f"the teacher's grid is {grid[0]} x {grid[1]} tokens, the student's {student_grid[0]} x {student_grid[1]}"
            ": set teacher.grid to the student's, or teacher.resample to area or bilinear."
        )
    teacher = Teacher.from_pretrained(
        settings.name_or_path,
        grid=(grid[0], grid[1]),
        layer=settings.layer,
        subfolder=settings.subfolder,
        revision=settings.revision,
    )
    if config.alignment.class_token_weight is not None and not teacher.has_class_token:
        raise ConfigurationError(
            f"{config.alignment.preset} denoises the teacher's class token, but {settings.name_or_path} has none: "
            "change teacher.name_or_path or alignment.preset."
        )
    return teacher


def build_student(
    config: TrainingConfig, transformer: SiTTransformer2DModel, teacher: Teacher | None, criterion: AlignmentLoss
) -> AlignedDenoiser:
    """Transformer, tap and projector as one trainable module.

    Raises:
        ConfigurationError: a depth outside the blocks, or an unknown projector.
    """
    if config.model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if not criterion.features():
        return AlignedDenoiser(transformer, tap={}, projector={})
    projector = None
    if config.alignment.projector is not None and teacher is not None:
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        projector = build_projector(config.alignment.projector, width, teacher.feature_dim)
    student = AlignedDenoiser(transformer, tap=resolve_tap(config, transformer), projector=projector)
    saved = None if config.model.init_from is None else Path(config.model.init_from) / "projectors"
    if saved is not None and projector is not None and saved.is_dir():
        student.load_projectors(saved)
        logger.info(f"projectors continue from {saved}")
    return student


def resolve_tap(config: TrainingConfig, transformer: SiTTransformer2DModel) -> str:
    """The dotted path of the module whose output is aligned.

    Raises:
        ConfigurationError: `alignment.depth` is outside the transformer's blocks.
    """
    if config.alignment.tap is not None:
        return config.alignment.tap
    num_layers = len(transformer.transformer_blocks)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    depth = config.alignment.depth or default_depth(num_layers, width)
    if depth > num_layers:
        raise ConfigurationError(
            f"alignment.depth is {depth}, but the transformer has blocks 1 to {num_layers}: change alignment.depth."
        )
    logger.info(f"alignment taps the output of block {depth} of {num_layers}")
    return f"transformer_blocks.{depth - 1}"
