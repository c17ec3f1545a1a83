"""From a configuration to the parts of a run, every mismatch found before training starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import IterableDataset

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.build import build_terms
from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.data.datasets import load_image_dataset
from diffusers_srepa.data.order import GlobalBatchSampler
from diffusers_srepa.errors import ConfigurationError, in_options
from diffusers_srepa.latents.latent_space import LatentSpace
from diffusers_srepa.latents.loading import load_latent_space
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.teachers.auto_teacher import Teacher
from diffusers_srepa.training.config import TrainingConfig
from diffusers_srepa.training.student import build_student, build_transformer, student_patch_size, token_grid
from diffusers_srepa.training.teachers import build_teacher, teacher_settings


logger = get_logger(__name__)

DATA_OPTIONS = {"name_or_path": "data.dataset"}
DATA_OPTIONS |= {
    name: f"data.{name}"
    for name in ("name", "split", "streaming", "image_column", "label_column", "resolution", "horizontal_flip")
}
DATA_OPTIONS |= {name: f"data.{name}" for name in ("on_bad_image", "latent_cache", "num_workers")}
DATA_OPTIONS |= {name: f"training.{name}" for name in ("global_batch_size", "micro_batch_size")}
DATA_OPTIONS |= {
    "num_classes": "model.num_classes",
    "resume_from_checkpoint": "--resume_from_checkpoint latest",
    "resume_with_changes": "--resume_with_changes",
    "flip": "--flip",
}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Components:
    """The parts of a run, on the CPU and not yet wrapped.

    Args:
        dataset: Map-style or streaming dataset of training items.
        id2label: Class names by index, if the dataset has them.
        codec: Images to latents and back.
        teachers: Frozen encoders by name, those that a term needs.
        transformer: The student's transformer.
        student: Transformer, tap and projectors as one trainable module.
        criterion: The alignment terms.
        student_grid: Token grid of the student.
    """

    dataset: Any
    id2label: dict[int, str] | None
    codec: LatentSpace
    teachers: dict[str, Teacher]
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
    # A null term was taken out of the preset; it stays in the configuration, so that reading it again does the same.
    terms = {name: term for name, term in alignment.terms.items() if term is not None}
    criterion = AlignmentLoss(build_terms(terms, alignment.target_transform))
    needed = {*criterion.teachers(), *([] if alignment.class_token_weight is None else [DEFAULT])}
    codec = build_codec(config)
    student_grid = token_grid(config, codec, student_patch_size(config))
    teachers = {name: build_teacher(config, name, student_grid) for name in sorted(needed)}
    with accelerator.main_process_first():
        dataset = build_dataset(config, codec, needs_pixels=bool(teachers))
    num_classes = resolve_num_classes(config, dataset.num_classes)
    if isinstance(dataset, IterableDataset):
        # A stream cannot look at all labels beforehand: it refuses one beyond the classes when it meets it.
        dataset.num_classes = num_classes  # type: ignore[attr-defined]
    transformer = build_transformer(config, codec, num_classes, teachers.get(DEFAULT))
    for term in criterion.terms.values():
        if term.teacher is not None:
            term.resample = term.resample or teacher_settings(config, term.teacher).resample
    return Components(
        dataset=dataset,
        id2label=dataset.id2label,
        codec=codec,
        teachers=teachers,
        transformer=transformer,
        student=build_student(config, transformer, teachers, criterion),
        criterion=criterion,
        student_grid=student_grid,
    )


def build_codec(config: TrainingConfig) -> LatentSpace:
    """The codec that `latents.vae` names.

    Raises:
        ConfigurationError: it cannot be loaded, or the resolution is no multiple of its down-sampling.
    """
    latents = config.latents
    with in_options({"name_or_path": "latents.vae", "subfolder": "latents.subfolder"}):
        codec = load_latent_space(
            latents.vae, subfolder=latents.subfolder, revision=latents.revision, dtype=_DTYPES[latents.dtype]
        )
    if config.data.resolution % codec.downsample_factor:
        raise ConfigurationError(
            f"data.resolution is {config.data.resolution}, which is no multiple of {codec.downsample_factor}, the "
            f"down-sampling of {latents.vae}: change data.resolution or latents.vae."
        )
    return codec


def build_dataset(config: TrainingConfig, codec: LatentSpace, needs_pixels: bool) -> Any:
    """The training images, with moments from the latent cache if one is given."""
    data = config.data
    with in_options(DATA_OPTIONS):
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
            encoder_id=codec.encoder_id if data.latent_cache else None,
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
