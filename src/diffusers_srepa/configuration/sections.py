"""The sections of a training run's configuration, one dataclass by concern.

A value that a preset may set defaults to None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffusers_srepa.alignment.presets import DEFAULT_PRESET
from diffusers_srepa.configuration.options import option
from diffusers_srepa.schedulers.registry import SCHEDULER_TITLES


@dataclass
class ModelConfig:
    """The transformer."""

    preset: str = option("SiT-XL/2", "Size, SiT-{S,B,L,XL}/{2,4,8}; the options below replace its values.")
    init_from: str | None = option(
        None,
        "Pipeline (folder or Hub id) whose transformer and projectors training starts from.",
        resume=True,
        also=("pretrained_model_name_or_path",),
    )
    patch_size: int | None = option(None, "Latent pixels per token and side.", minimum=1)
    num_layers: int | None = option(None, "Number of transformer blocks.", minimum=1)
    num_attention_heads: int | None = option(None, "Attention heads per block.", minimum=1)
    attention_head_dim: int | None = option(
        None, "Width of a head; the hidden width is heads x head width.", minimum=1
    )
    mlp_ratio: float | None = option(None, "Width of a block's MLP relative to the hidden width.", above=0)
    qk_norm: bool | None = option(None, "Normalise queries and keys.")
    num_classes: int | None = option(None, "Number of classes; by default the dataset's.", minimum=1)
    class_dropout_prob: float = option(
        0.1,
        "Share of labels replaced by the null class, for guidance.",
        minimum=0,
        below=1,
        card="Label dropout",
        also=("cfg_prob",),
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", resume=True
    )
    compile: bool = option(False, "Compile the transformer blocks with torch.compile.", resume=True)


@dataclass
class LatentsConfig:
    """Where the model lives: the latents of an autoencoder, or pixels."""

    vae: str = option(
        "stabilityai/sd-vae-ft-mse",
        'Autoencoder (folder or Hub id, also of a pipeline that has a vae), or "pixels".',
        also=("pretrained_vae_model_name_or_path",),
    )
    subfolder: str | None = option(None, "Folder of the autoencoder inside its repository.", also=("vae_subfolder",))
    revision: str | None = option(None, "Revision of the autoencoder's repository.", also=("vae_revision",))
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Precision in which images are encoded.", also=("vae_dtype",)
    )


@dataclass
class TeacherConfig:
    """A frozen vision encoder."""

    name_or_path: str = option(
        "facebook/dinov2-base", "Model (folder or Hub id); loaded only if a term of the alignment needs it."
    )
    grid: tuple[int, int] | None = option(
        None,
        "Rows and columns of its tokens; by default the finer of the student's grid and resolution / 16.",
        minimum=1,
    )
    layer: int | None = option(
        None, "Block of the teacher to read, counted from 1; by default the family's usual output."
    )
    resample: Literal["area", "bilinear"] | None = option(
        None, "How teacher tokens come to a coarser or finer student grid; by default a mismatch is an error."
    )
    subfolder: str | None = option(None, "Folder of the model inside its repository.")
    revision: str | None = option(None, "Revision of the model's repository.")


@dataclass
class AlignmentConfig:
    """What is aligned with what, and how strongly."""

    preset: str = option(
        DEFAULT_PRESET, "Method by the paper's name: sit, repa, irepa, srepa-mse, srepa-kl, structure-mse, ..."
    )
    depth: int | None = option(
        None, "Block whose output is aligned, from 1; by default 4 for B, 8 for L and XL, else a third.", minimum=1
    )
    tap: str | None = option(None, "Dotted path of the module whose output is aligned, instead of depth.")
    taps: dict[str, Any] = option(
        default_factory=dict,
        help="Further taps by name, each a depth or a dotted path; a term names its own with `tap`.",
    )
    projector: str | dict[str, Any] | None = option(
        None, "Projector from student to teacher width: mlp, linear, conv, or {name: mlp, hidden_dim: ...}."
    )
    projectors: dict[str, Any] = option(
        default_factory=dict,
        help="Projectors by name that differ from `projector`; a term names its own with `projector`.",
    )
    target_transform: dict[str, Any] | None = option(
        None, "What is done to the teacher's tokens first, e.g. {name: spatial_norm, alpha: 0.6}."
    )
    terms: dict[str, Any] = option(
        default_factory=dict,
        help="Alignment terms by name, {objective: {name: ...}, weight: number or schedule}; null removes a preset's.",
    )
    class_token_weight: float | None = option(
        None,
        "Weight of the class token's own flow loss (REG); null trains without a class token.",
        card="Weight of the class token's flow loss",
    )


@dataclass
class FlowConfig:
    """The flow-matching objective."""

    path: str = option("linear", "Path between data and noise.", choices=("linear", "cosine"))
    timestep_sampling: str = option(
        "uniform", "How the training times are drawn.", choices=("uniform", "lognormal"), formerly="flow.timestep_law"
    )
    lognormal_mean: float = option(0.0, "Mean of log(sigma / alpha) for log-normal times.")
    lognormal_std: float = option(1.0, "Standard deviation of log(sigma / alpha) for log-normal times.", minimum=0)


@dataclass
class ImagesConfig:
    """Which images, and how they are cropped."""

    dataset: str | None = option(
        None,
        "Dataset of the Hub, or a local folder of images, parquet or arrow files.",
        resume=True,
        also=("dataset_name", "train_data_dir"),
    )
    name: str | None = option(None, "Configuration of the dataset.", also=("dataset_config_name",))
    split: str = option("train", "Split to read.")
    revision: str | None = option(None, "Revision of the dataset's repository.")
    data_dir: str | None = option(None, "Folder inside the dataset's repository.", resume=True)
    image_column: str | None = option(None, "Column of the images; by default the only one of that type.")
    label_column: str | None = option(None, "Column of the class labels; by default found by type and name.")
    resolution: int = option(256, "Side of the square images in pixels, after the ADM centre crop.", minimum=1)
    on_bad_image: Literal["skip", "raise"] = option(
        "skip", "What to do with an image that cannot be read; skipped ones are counted."
    )
    transparent_color: str = option("white", "What transparent pixels lie on: #rrggbb or the name of a colour.")
    cache_dir: str | None = option(None, "Folder for downloads.", resume=True)


@dataclass
class DataConfig(ImagesConfig):
    """The images, and how training reads them."""

    streaming: bool = option(False, "Read the dataset as a stream instead of downloading it first.")
    horizontal_flip: bool = option(
        False, "Flip half of the images, in every epoch anew.", card="Horizontal flips", also=("random_flip",)
    )
    latent_cache: str | None = option(None, "Folder written by `diffusers-srepa cache-latents`.", resume=True)
    num_workers: int = option(
        4,
        "Worker processes of the data loader, per process.",
        minimum=0,
        resume=True,
        also=("dataloader_num_workers",),
    )


@dataclass
class OptimizerConfig:
    """AdamW and its schedule (paper A.1)."""

    lr: float = option(1e-4, "Learning rate.", minimum=0, also=("learning_rate",))
    betas: tuple[float, float] = option(
        (0.9, 0.999), "Decay rates of the two moments.", minimum=0, below=1, also=("adam_beta1", "adam_beta2")
    )
    eps: float = option(1e-8, "Added to the root of the second moment.", minimum=0, also=("adam_epsilon",))
    weight_decay: float = option(0.0, "Decoupled weight decay.", minimum=0, also=("adam_weight_decay",))
    max_grad_norm: float = option(
        1.0, "Global gradient norm above which gradients are scaled down; 0 switches clipping off.", minimum=0
    )
    lr_schedule: str = option(
        "constant", "Name of a schedule of diffusers: constant, cosine, linear, ...", also=("lr_scheduler",)
    )
    lr_warmup_steps: int = option(0, "Steps of linear warm-up, for schedules that have one.", minimum=0)


@dataclass
class LoopConfig:
    """How long, how large, how precisely."""

    max_steps: int = option(
        400_000,
        "Optimiser steps in all, also after a resume.",
        minimum=1,
        resume=True,
        also=("max_train_steps", "num_train_epochs"),
    )
    global_batch_size: int = option(
        256,
        "Images per optimiser step over all processes and accumulated batches.",
        minimum=1,
        also=("gradient_accumulation_steps", "batch_size"),
    )
    micro_batch_size: int | None = option(
        None,
        "Images per forward pass and process; by default all its share.",
        minimum=1,
        resume=True,
        also=("train_batch_size",),
    )
    mixed_precision: Literal["bf16", "fp16", "no"] | None = option(
        None, "Precision of the computation; by default what the launcher was told, else bf16."
    )
    ema_decay: float = option(
        0.9999, "Decay of the moving average of the weights, constant.", minimum=0, below=1, also=("use_ema",)
    )
    allow_tf32: bool = option(True, "Use TF32 in float32 matrix products on GPUs that have it.")
    log_every: int = option(50, "Steps between two logged values.", minimum=1, resume=True)
    max_skipped_steps: int = option(
        20, "Steps in a row skipped for a loss or gradient that is not finite, before the run ends.", minimum=0
    )


@dataclass
class SamplingConfig:
    """The scheduler of the written pipeline, and the settings of the validation grids."""

    scheduler: str = option(
        "euler-maruyama",
        "Sampler; euler-maruyama is the paper's SDE sampler, euler the ODE.",
        choices=tuple(SCHEDULER_TITLES),
    )
    num_inference_steps: int = option(250, "Model calls per image.", minimum=1)
    guidance_scale: float = option(1.0, "Classifier-free guidance weight; 1 switches it off.", minimum=0)
    guidance_interval: tuple[float, float] = option((0.0, 1.0), "Times t between which guidance acts, 1 = noise.")
    guidance_channels: int | None = option(
        None, "Number of latent channels, from the first, that are guided; by default all."
    )


@dataclass
class ValidationConfig:
    """Sample grids made during training with the EMA weights, from fixed seeds."""

    every: int = option(
        10_000, "Steps between two grids; 0 makes none, not even at the end.", minimum=0, also=("validation_steps",)
    )
    class_labels: list[Any] | None = option(
        None,
        "Classes (numbers or names); by default the first num_images.",
        also=("validation_prompt", "validation_prompts"),
    )
    num_images: int = option(
        16, "Number of images when class_labels is not given.", minimum=1, also=("num_validation_images",)
    )
    batch_size: int = option(16, "Images sampled at a time.", minimum=1)
    # What the generators of torch take.
    seed: int = option(0, "Seed of the first image; image i has seed + i.", minimum=0, below=2**63)


@dataclass
class CheckpointConfig:
    """Checkpoints to resume from."""

    every: int = option(
        10_000,
        "Steps between two checkpoints; one is written at the end too.",
        minimum=1,
        also=("checkpointing_steps",),
    )
    total_limit: int | None = option(
        None,
        "Number of checkpoints kept, the newest ones; null keeps all.",
        minimum=1,
        also=("checkpoints_total_limit",),
    )


@dataclass
class TrackingConfig:
    """Where logged values go besides metrics.jsonl in the output folder."""

    report_to: str = option("auto", 'An accelerate tracker, "all", "none", or "auto": tensorboard where installed.')
    project_name: str = option(
        "diffusers-srepa", "Project under which the tracker files the run.", also=("tracker_project_name",)
    )
    run_name: str | None = option(None, "Name of the run, for trackers that have one.")
