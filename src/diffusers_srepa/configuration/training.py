"""The configuration of a training run: what every method needs, and what aligned flow matching adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers_srepa.alignment.presets import DEFAULT_PRESET, alignment_preset
from diffusers_srepa.configuration.files import merge
from diffusers_srepa.configuration.options import Options, option
from diffusers_srepa.configuration.sections import (
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
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.files import check_name


DEFAULT_METHOD = "aligned-flow-matching"


@dataclass
class RunConfig(Options):
    """A training run of any method; a method of its own subclasses it with its own sections."""

    output_dir: str | None = option(
        None,
        "Folder of the pipeline, its checkpoints, logs and grids.",
        resume=True,
        also=("logging_dir",),
    )
    # What the generators of numpy take.
    seed: int = option(
        0, "Seed of initialisation, data order and every random number of training.", minimum=0, below=2**32
    )
    method: str = option(DEFAULT_METHOD, "What is trained and how, by name.")
    resume_from_checkpoint: str | None = option(None, '"latest", or the path of a checkpoint folder.', resume=True)
    resume_with_changes: bool = option(
        False, "Resume although options that shape the training differ from the checkpoint's.", resume=True
    )
    overwrite_output_dir: bool = option(
        False, "Start anew in an output folder that holds another run, deleting that run's files.", resume=True
    )
    expected_processes: int | None = option(
        None, "Stop if the launcher starts another number of processes than this.", minimum=1, resume=True
    )
    push_to_hub: bool = option(False, "Upload the finished pipeline to the Hub.", resume=True)
    hub_model_id: str | None = option(
        None, "Repository on the Hub; by default the output folder's name under your account.", resume=True
    )
    hub_private: bool = option(False, "Create the repository as private.", resume=True)
    hub_license: str | None = option(
        None, "Licence of the weights for the model card, such as apache-2.0; by default none.", resume=True
    )
    model: ModelConfig = option(default_factory=ModelConfig, help="The transformer.")
    latents: LatentsConfig = option(default_factory=LatentsConfig, help="The space it works in.")
    data: DataConfig = option(default_factory=DataConfig, help="The images.")
    optimizer: OptimizerConfig = option(default_factory=OptimizerConfig, help="The optimiser.")
    training: LoopConfig = option(default_factory=LoopConfig, help="The loop.")
    sampling: SamplingConfig = option(default_factory=SamplingConfig, help="The sampler.", resume=True)
    validation: ValidationConfig = option(default_factory=ValidationConfig, help="The validation grids.", resume=True)
    checkpoints: CheckpointConfig = option(default_factory=CheckpointConfig, help="The checkpoints.", resume=True)
    tracking: TrackingConfig = option(default_factory=TrackingConfig, help="The trackers.", resume=True)

    def validate(self) -> None:
        """Refuse values that cannot work, whatever the data and the models are."""
        if not self.output_dir:
            raise ConfigurationError("no output folder is given: set --output_dir.")
        if not self.data.dataset:
            raise ConfigurationError("no dataset is given: set --data.dataset to a Hub id or a local folder.")
        if self.data.streaming and self.data.latent_cache:
            raise ConfigurationError(
                "a latent cache needs rows by number, which a stream has not: unset data.streaming or "
                "data.latent_cache."
            )
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise ConfigurationError(
                "resume_from_checkpoint and overwrite_output_dir are both given: set one of them."
            )
        super().validate()
        check_name("tracking.project_name", self.tracking.project_name, free=True)
        if self.tracking.run_name is not None:
            check_name("tracking.run_name", self.tracking.run_name, free=True)
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


@dataclass
class TrainingConfig(RunConfig):
    """A training run of flow matching with representation alignment."""

    teacher: TeacherConfig = option(default_factory=TeacherConfig, help="The frozen vision encoder.")
    teachers: dict[str, TeacherConfig] = option(
        default_factory=dict,
        help="Further encoders by name, each with the options of teacher; a term names its own with `target`.",
    )
    alignment: AlignmentConfig = option(default_factory=AlignmentConfig, help="The alignment terms.")
    flow: FlowConfig = option(default_factory=FlowConfig, help="The flow-matching objective.")

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`values` over the alignment preset that they name, or over the default one."""
        alignment = values.get("alignment", {})
        if not isinstance(alignment, Mapping):
            return values
        if isinstance(alignment.get("projector"), str):
            alignment = {**alignment, "projector": {"name": alignment["projector"]}}
        preset = alignment_preset(str(alignment.get("preset", DEFAULT_PRESET)))
        return {**values, "alignment": merge(preset, alignment)}

    def validate(self) -> None:
        """As for every run, and the alignment."""
        super().validate()
        if self.alignment.depth is not None and self.alignment.tap is not None:
            raise ConfigurationError(
                f"alignment.depth ({self.alignment.depth}) and alignment.tap ({self.alignment.tap!r}) are both given: "
                "set one of them."
            )
