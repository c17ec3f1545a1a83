"""The configuration of a training run: nested dataclasses by concern.

A value that a preset may set defaults to None. `diffusers_srepa.training.command_line` merges presets, YAML files and
command-line options into a `TrainingConfig`; `validate` refuses what cannot work, before anything is loaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from diffusers_srepa.alignment.presets import DEFAULT_PRESET
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.interpolant import TIMESTEP_LAWS, get_interpolant


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
    """

    max_steps: int = 400_000
    global_batch_size: int = 256
    micro_batch_size: int | None = None
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    ema_decay: float = 0.9999
    allow_tf32: bool = True
    log_every: int = 50


@dataclass
class SamplingConfig:
    """The scheduler of the written pipeline, and the settings of the validation grids.

    Args:
        scheduler: "euler-maruyama" (the paper's SDE sampler) or "euler" (the ODE).
        num_inference_steps: Model calls per image.
        guidance_scale: Classifier-free guidance weight; 1 switches it off.
        guidance_interval: Times t between which guidance acts, 1 = noise.
    """

    scheduler: Literal["euler-maruyama", "euler"] = "euler-maruyama"
    num_inference_steps: int = 250
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)


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


@dataclass
class TrainingConfig:
    """A training run.

    Args:
        output_dir: Folder of the finished pipeline, its checkpoints, logs and validation grids.
        seed: Seed of initialisation, data order and every random number of training.
        resume_from_checkpoint: "latest", or the path of a checkpoint folder.
        resume_with_changes: Resume although options that shape the training differ from the checkpoint's.
        overwrite_output_dir: Start anew in an output folder that holds another run, deleting that run's files.
        expected_processes: Stop if the launcher starts another number of processes than this.
        push_to_hub: Upload the finished pipeline to the Hub.
        hub_model_id: Repository on the Hub; by default the output folder's name under your account.
        hub_private: Create the repository as private.
        hub_license: Licence of the weights for the model card, such as apache-2.0; by default none is named.
        model: The student.
        latents: The student's space.
        teacher: The frozen vision encoder.
        teachers: Further encoders by name, each with the options of teacher; a term names its own with `target`.
        alignment: The alignment terms.
        flow: The flow-matching objective.
        data: The images.
        optimizer: The optimiser.
        training: The loop.
        sampling: The sampler.
        validation: The validation grids.
        checkpoints: The checkpoints.
        tracking: The trackers.
    """

    output_dir: str | None = None
    seed: int = 0
    resume_from_checkpoint: str | None = None
    resume_with_changes: bool = False
    overwrite_output_dir: bool = False
    expected_processes: int | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False
    hub_license: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def validate(self) -> None:
        """Refuse values that cannot work, whatever the data and the models are.

        Raises:
            ConfigurationError: naming the option to change.
        """
        if not self.output_dir:
            raise ConfigurationError("no output folder is given: set --output_dir.")
        if not self.data.dataset:
            raise ConfigurationError("no dataset is given: set --data.dataset to a Hub id or a local folder.")
        if self.alignment.depth is not None and self.alignment.tap is not None:
            raise ConfigurationError(
                f"alignment.depth ({self.alignment.depth}) and alignment.tap ({self.alignment.tap!r}) are both given: "
                "set one of them."
            )
        if self.data.streaming and self.data.latent_cache:
            raise ConfigurationError(
                "a latent cache needs rows by number, which a stream has not: unset data.streaming or "
                "data.latent_cache."
            )
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise ConfigurationError(
                "resume_from_checkpoint and overwrite_output_dir are both given: set one of them."
            )
        low, high = self.sampling.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ConfigurationError(
                f"sampling.guidance_interval is [{low}, {high}], but must be two times with 0 <= low <= high <= 1."
            )
        if self.validation.class_labels == []:
            raise ConfigurationError("validation.class_labels is empty: name a class, or set validation.every to 0.")
        get_interpolant(self.flow.path)
        if self.flow.timestep_law not in TIMESTEP_LAWS:
            raise ConfigurationError(
                f"flow.timestep_law is {self.flow.timestep_law!r}, but must be one of {', '.join(TIMESTEP_LAWS)}."
            )
        self._validate_numbers()

    def _validate_numbers(self) -> None:
        at_least = {
            "seed": (self.seed, 0),
            "optimizer.eps": (self.optimizer.eps, 0),
            "data.resolution": (self.data.resolution, 1),
            "data.num_workers": (self.data.num_workers, 0),
            "training.max_steps": (self.training.max_steps, 1),
            "training.global_batch_size": (self.training.global_batch_size, 1),
            "training.log_every": (self.training.log_every, 1),
            "optimizer.lr": (self.optimizer.lr, 0),
            "optimizer.weight_decay": (self.optimizer.weight_decay, 0),
            "optimizer.max_grad_norm": (self.optimizer.max_grad_norm, 0),
            "optimizer.lr_warmup_steps": (self.optimizer.lr_warmup_steps, 0),
            "flow.lognormal_std": (self.flow.lognormal_std, 0),
            "sampling.num_inference_steps": (self.sampling.num_inference_steps, 1),
            "sampling.guidance_scale": (self.sampling.guidance_scale, 0),
            "validation.every": (self.validation.every, 0),
            "validation.num_images": (self.validation.num_images, 1),
            "validation.batch_size": (self.validation.batch_size, 1),
            "checkpoints.every": (self.checkpoints.every, 1),
        }
        optional = {
            "training.micro_batch_size": self.training.micro_batch_size,
            "model.num_classes": self.model.num_classes,
            "checkpoints.total_limit": self.checkpoints.total_limit,
            "expected_processes": self.expected_processes,
            "alignment.depth": self.alignment.depth,
        }
        at_least |= {name: (value, 1) for name, value in optional.items() if value is not None}
        for name, (value, smallest) in at_least.items():
            if not value >= smallest:
                raise ConfigurationError(f"{name} is {value}, but must be at least {smallest}.")
        probabilities = {
            "model.class_dropout_prob": self.model.class_dropout_prob,
            "training.ema_decay": self.training.ema_decay,
            "optimizer.betas[0]": self.optimizer.betas[0],
            "optimizer.betas[1]": self.optimizer.betas[1],
        }
        for name, probability in probabilities.items():
            if not 0 <= probability < 1:
                raise ConfigurationError(f"{name} is {probability}, but must be at least 0 and below 1.")
        for name, teacher in {"teacher": self.teacher, **self.teachers}.items():
            if teacher.grid is not None and min(teacher.grid) < 1:
                raise ConfigurationError(f"{name}.grid is {teacher.grid}, but both numbers must be at least 1.")

    def to_dict(self) -> dict[str, Any]:
        """The whole configuration as plain nested dicts and lists, ready for YAML or JSON."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
