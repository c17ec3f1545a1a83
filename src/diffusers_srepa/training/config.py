"""The configuration of a training run: nested dataclasses by concern.

`diffusers_srepa.training.command_line` merges presets, YAML files and command-line options into a `TrainingConfig`;
`validate` refuses what cannot work, before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from diffusers_srepa.errors import ConfigurationError, in_options
from diffusers_srepa.interpolant import TIMESTEP_SAMPLINGS, get_interpolant
from diffusers_srepa.training.config_sections import (
    AlignmentConfig,
    CheckpointConfig,
    DataConfig,
    FlowConfig,
    LatentsConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TeacherConfig,
    TrackingConfig,
    ValidationConfig,
)


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
        _check_finite(self.to_dict())
        low, high = self.sampling.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ConfigurationError(
                f"sampling.guidance_interval is [{low}, {high}], but must be two times with 0 <= low <= high <= 1."
            )
        wrong = [label for label in self.validation.class_labels or () if type(label) not in (int, str)]
        if wrong:
            raise ConfigurationError(
                f"validation.class_labels holds {wrong[0]!r}, but must hold numbers or names of classes."
            )
        if self.validation.class_labels == []:
            raise ConfigurationError("validation.class_labels is empty: name a class, or set validation.every to 0.")
        with in_options({"path": "flow.path"}):
            get_interpolant(self.flow.path)
        if self.flow.timestep_law not in TIMESTEP_SAMPLINGS:
            raise ConfigurationError(
                f"flow.timestep_law is {self.flow.timestep_law!r}, but must be one of {', '.join(TIMESTEP_SAMPLINGS)}."
            )
        self._validate_numbers()

    def _validate_numbers(self) -> None:
        at_least = {
            "optimizer.eps": (self.optimizer.eps, 0),
            "data.resolution": (self.data.resolution, 1),
            "data.num_workers": (self.data.num_workers, 0),
            "training.max_steps": (self.training.max_steps, 1),
            "training.global_batch_size": (self.training.global_batch_size, 1),
            "training.log_every": (self.training.log_every, 1),
            "training.max_skipped_steps": (self.training.max_skipped_steps, 0),
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
            "model.patch_size": self.model.patch_size,
            "model.num_layers": self.model.num_layers,
            "model.num_attention_heads": self.model.num_attention_heads,
            "model.attention_head_dim": self.model.attention_head_dim,
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
        if self.model.mlp_ratio is not None and not self.model.mlp_ratio > 0:
            raise ConfigurationError(f"model.mlp_ratio is {self.model.mlp_ratio}, but must be above 0.")
        # What the generators of numpy and torch take.
        for name, seed, limit in (("seed", self.seed, 2**32), ("validation.seed", self.validation.seed, 2**63)):
            if not 0 <= seed < limit:
                raise ConfigurationError(f"{name} is {seed}, but must be at least 0 and below {limit}.")
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


def _check_finite(values: Any, name: str = "") -> None:
    if isinstance(values, float) and not math.isfinite(values):
        raise ConfigurationError(f"{name} is {values}, but must be a finite number.")
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        _check_finite(value, f"{name}.{key}" if name else str(key))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
