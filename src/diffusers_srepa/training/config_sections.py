"""The sections of a training run's configuration, one dataclass by concern.

A value that a preset may set defaults to None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers_srepa.alignment.presets import DEFAULT_PRESET


@dataclass
class ModelConfig:
    """The student.

    Args:
        preset: Size of the transformer, SiT-{S,B,L,XL}/{2,4,8}; the fields below that are given replace its values.
        init_from: Pipeline (folder or Hub id) whose transformer, and projectors if it has them, training starts from.
        patch_size: Latent pixels per token and side.
        num_layers: Number of transformer blocks.
        num_attention_heads: Attention heads per block.
        attention_head_dim: Width of one attention head; the hidden width is heads x head width.
        mlp_ratio: Hidden width of a block's MLP relative to the hidden width.
        qk_norm: Normalise queries and keys.
        num_classes: Number of classes; by default the dataset's.
        class_dropout_prob: Share of labels replaced by the null class, for classifier-free guidance.
        gradient_checkpointing: Recompute block activations in the backward pass to save memory.
        compile: Compile the transformer blocks with torch.compile.
    """

    preset: str = "SiT-XL/2"
    init_from: str | None = None
    patch_size: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    mlp_ratio: float | None = None
    qk_norm: bool | None = None
    num_classes: int | None = None
    class_dropout_prob: float = 0.1
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclass
class LatentsConfig:
    """Where the student lives: the latents of an autoencoder, or pixels.

    Args:
        vae: Autoencoder (folder or Hub id, also of a pipeline that has a vae), or "pixels".
        subfolder: Folder of the autoencoder inside its repository.
        revision: Revision of the autoencoder's repository.
        dtype: Precision in which images are encoded.
    """

    vae: str = "stabilityai/sd-vae-ft-mse"
    subfolder: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass
class TeacherConfig:
    """The frozen vision encoder.

    Args:
        name_or_path: Model (folder or Hub id); not loaded when no term of the alignment needs a teacher.
        grid: Rows and columns of teacher tokens; by default the finer of the student's grid and resolution / 16.
        layer: Block of the teacher to read, counted from 1; by default the family's usual output.
        resample: How teacher tokens come to a coarser or finer student grid, "area" or "bilinear"; by default a
            mismatch is an error.
        subfolder: Folder of the model inside its repository.
        revision: Revision of the model's repository.
    """

    name_or_path: str = "facebook/dinov2-base"
    grid: tuple[int, int] | None = None
    layer: int | None = None
    resample: Literal["area", "bilinear"] | None = None
    subfolder: str | None = None
    revision: str | None = None


@dataclass
class AlignmentConfig:
    """What is aligned with what, and how strongly.

    Args:
        preset: Method by the paper's name: sit, repa, irepa, srepa-mse, srepa-kl, structure-mse, ...
        depth: Block whose output is aligned, counted from 1; by default 4 for B, 8 for L and XL, else a third.
        tap: Dotted path of the module whose output is aligned, instead of depth.
        taps: Further taps by name, each a depth or a dotted path; a term names its own with `tap`.
        projector: Projector from student to teacher width, {name: mlp | linear | conv, ...}.
        projectors: Projectors by name that differ from `projector`; a term names its own with `projector`.
        target_transform: What is done to the teacher's tokens first, e.g. {name: spatial_norm, alpha: 0.6}.
        terms: Alignment terms by name, {objective: {name: ...}, weight: number or schedule}; null removes a preset's.
        class_token_weight: Weight of the class token's own flow loss (REG); null trains without a class token.
    """

    preset: str = DEFAULT_PRESET
    depth: int | None = None
    tap: str | None = None
    taps: dict[str, Any] = field(default_factory=dict)
    projector: dict[str, Any] | None = None
    projectors: dict[str, Any] = field(default_factory=dict)
    target_transform: dict[str, Any] | None = None
    terms: dict[str, Any] = field(default_factory=dict)
    class_token_weight: float | None = None


@dataclass
class FlowConfig:
    """The flow-matching objective.

    Args:
        path: Path between data and noise, "linear" or "cosine".
        timestep_law: Law of the training times, "uniform" or "lognormal".
        lognormal_mean: Mean of log(sigma / alpha) under the log-normal law.
        lognormal_std: Standard deviation of log(sigma / alpha) under the log-normal law.
    """

    path: str = "linear"
    timestep_law: str = "uniform"
    lognormal_mean: float = 0.0
    lognormal_std: float = 1.0


@dataclass
class DataConfig:
    """The images.

    Args:
        dataset: Dataset of the Hub, or a local folder of images, parquet or arrow files.
        name: Configuration of the dataset.
        split: Split to train on.
        revision: Revision of the dataset's repository.
        data_dir: Folder inside the dataset's repository.
        streaming: Read the dataset as a stream instead of downloading it first.
        image_column: Column of the images; by default the only one of that type.
        label_column: Column of the class labels; by default found by type and name.
        resolution: Side of the square training images in pixels, after the ADM centre crop.
        horizontal_flip: Flip half of the images, in every epoch anew.
        on_bad_image: What to do with an image that cannot be read: "skip" (counted) or "raise".
        latent_cache: Folder written by `diffusers-srepa cache-latents`.
        cache_dir: Folder for downloads.
        num_workers: Worker processes of the data loader, per training process.
    """

    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_dir: str | None = None
    streaming: bool = False
    image_column: str | None = None
    label_column: str | None = None
    resolution: int = 256
    horizontal_flip: bool = False
    on_bad_image: Literal["skip", "raise"] = "skip"
    latent_cache: str | None = None
    cache_dir: str | None = None
    num_workers: int = 4


@dataclass
class OptimizerConfig:
    """AdamW and its schedule (paper A.1).

    Args:
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Global gradient norm above which gradients are scaled down; 0 switches clipping off.
        lr_schedule: Name of a schedule of diffusers, "constant", "cosine", "linear", ...
        lr_warmup_steps: Steps of linear warm-up, for schedules that have one.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 0


@dataclass
class LoopConfig:
    """How long, how large, how precisely.

    Args:
        max_steps: Optimiser steps in all, counted from the very beginning also after a resume.
        global_batch_size: Images per optimiser step over all processes and accumulated batches.
        micro_batch_size: Images per forward pass and process; by default all of a process's share.
        mixed_precision: "bf16", "fp16" or "no".
        ema_decay: Decay of the moving average of the weights, constant.
        allow_tf32: Use TF32 in float32 matrix products on GPUs that have it.
        log_every: Steps between two logged values.
        max_skipped_steps: Steps in a row that are skipped because loss or gradient is not finite, before the run ends.
    """

    max_steps: int = 400_000
    global_batch_size: int = 256
    micro_batch_size: int | None = None
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    ema_decay: float = 0.9999
    allow_tf32: bool = True
    log_every: int = 50
    max_skipped_steps: int = 20


@dataclass
class SamplingConfig:
    """The scheduler of the written pipeline, and the settings of the validation grids.

    Args:
        scheduler: "euler-maruyama" (the paper's SDE sampler) or "euler" (the ODE).
        num_inference_steps: Model calls per image.
        guidance_scale: Classifier-free guidance weight; 1 switches it off.
        guidance_interval: Times t between which guidance acts, 1 = noise.
        guidance_channels: Number of latent channels, from the first, that are guided; by default all.
    """

    scheduler: Literal["euler-maruyama", "euler"] = "euler-maruyama"
    num_inference_steps: int = 250
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None


@dataclass
class ValidationConfig:
    """Sample grids made during training with the EMA weights, from fixed seeds.

    Args:
        every: Steps between two grids; 0 makes none, not even at the end.
        class_labels: Classes (numbers or names) of the images; by default the first num_images classes.
        num_images: Number of images when class_labels is not given.
        batch_size: Images sampled at a time.
        seed: Seed of the first image; image i has seed + i.
    """

    every: int = 10_000
    class_labels: list[Any] | None = None
    num_images: int = 16
    batch_size: int = 16
    seed: int = 0


@dataclass
class CheckpointConfig:
    """Checkpoints to resume from.

    Args:
        every: Steps between two checkpoints; one is also written at the end.
        total_limit: Number of checkpoints kept, the newest ones; null keeps all.
    """

    every: int = 10_000
    total_limit: int | None = None


@dataclass
class TrackingConfig:
    """Where logged values go besides metrics.jsonl in the output folder.

    Args:
        report_to: An accelerate tracker, "all", "none", or "auto": tensorboard where it is installed.
        project_name: Project under which the tracker files the run.
        run_name: Name of the run, for trackers that have one.
    """

    report_to: str = "auto"
    project_name: str = "diffusers-srepa"
    run_name: str | None = None
