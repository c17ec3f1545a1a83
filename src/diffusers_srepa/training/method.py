"""What a training method is: modules, the phases of a step, and the pipeline that results.

A step of the trainer runs the phases of the method in order, each on the same global batch: a phase computes the loss
of every micro-batch, then its optimiser updates the modules of the phase. Optimisers, moving average, sharding,
checkpoints and export go over `modules` and know nothing else about a method.

A method of your own subclasses `TrainingMethod` and is passed as an object, `Trainer(config, method=...)`, or gets a
row in `methods/registry.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffusers_srepa.configuration.sections import OptimizerConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.files import check_name
from diffusers_srepa.latents.latent_space import LatentSpace


# What a run writes besides the parts of its modules.
_RUN_FOLDERS = ("scheduler", "validation", "logs")


@dataclass(frozen=True)
class StepContext:
    """What a loss needs of the run.

    Args:
        step: Optimiser steps made before this one; keys of random numbers and schedules of weights.
        modules: The method's modules by name, to be called: those of the phase as the run has wrapped them, the
            others plain and frozen, so that gradients pass through them and stay nowhere.
        average_of: The averaged parameters of the module of a name, for `torch.func.functional_call`; not
            when FSDP2 shards.
        autocast: The context of the run's precision, for forward passes of models.
    """

    step: int
    modules: Mapping[str, nn.Module]
    average_of: Callable[[str], Mapping[str, torch.Tensor]]
    autocast: Callable[[], AbstractContextManager[Any]]


@dataclass
class LossOutput:
    """The loss of a micro-batch.

    Args:
        loss: Scalar with gradient, a mean over the samples, so that the mean over micro-batches is that of the batch.
        parts: Raw detached scalars by name, logged under these names; two phases may not share one.
        weights: Weights of the parts at this step by name, logged as `weight/<name>`.
    """

    loss: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """One update within a step.

    Args:
        name: Names the optimiser in checkpoints.
        modules: Names of the modules that it updates.
        loss: `loss(batch, context)` of one micro-batch; called with gradients enabled.
        optimizer: Its optimiser's options; by default those of the section `optimizer`.
    """

    name: str
    modules: tuple[str, ...]
    loss: Callable[[Mapping[str, torch.Tensor], StepContext], LossOutput]
    optimizer: OptimizerConfig | None = None


class TrainingMethod(ABC):
    """What is trained, by which losses, and what is published.

    The trainer builds a method by its name and configuration, or takes one that is built; then it loads the data,
    calls `prepare`, moves everything to the device, wraps `modules`, and runs `phases`.

    A module is saved into a folder of its own name; one that has `saved_parts() -> {folder: module}` into those.
    What has `save_pretrained` is written by it, anything else as bare safetensors weights.

    Attributes:
        modules (`dict[str, nn.Module]`): what is trained, by name; complete after `prepare`.
        phases (`tuple[Phase, ...]`): the updates of a step, in order.
        latent_space (`LatentSpace`, *optional*): where images are encoded; None if the method needs no images.
        needs_images (`bool`): whether batches carry `pixel_values` also where they carry cached `moments`.
    """

    modules: dict[str, nn.Module]
    phases: tuple[Phase, ...]
    latent_space: LatentSpace | None = None
    needs_images: bool = True

    def prepare(self, dataset: Any) -> None:  # noqa: B027
        """Build what depends on the data.

        Args:
            dataset: the training data, with `num_classes` and `id2label`.

        Raises:
            ConfigurationError: the data do not fit.
        """

    def to(self, device: torch.device) -> None:
        """Move what is not trained (latent space, frozen models) to the run's device."""
        if self.latent_space is not None:
            self.latent_space.to(device)

    def release(self, step: int) -> set[str]:
        """Let go of what is not needed any more from `step` on, for good.

        Returns:
            `set[str]`: names of the modules in which parameters have been frozen.
        """
        return set()

    @abstractmethod
    def build_pipeline(self, modules: Mapping[str, nn.Module]) -> Any:
        """The pipeline around whole, unwrapped `modules`, sampling with the weights that they have.

        It is a `SiTPipeline`, or has its `transformer`, `components`, `check_components`, `check_guidance` and call by
        `class_labels`.
        """

    def autoencoder_reference(self) -> dict[str, Any] | None:
        """Where the pipeline's `vae` comes from, as `autoencoder.json` of a checkpoint says it; None for pixels."""
        return None

    def describe(self) -> list[str]:
        """Lines about the method for the start of a run."""
        return []

    def card_facts(self) -> dict[str, Any]:
        """Fields of `ModelCardFacts` that only the method knows."""
        return {}


def saved_parts(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, nn.Module]]:
    """What is saved, by folder: the name of the module that it belongs to, and the part itself.

    Raises:
        ConfigurationError: a folder of two parts, or one that the run itself writes to.
    """
    parts: dict[str, tuple[str, nn.Module]] = {}
    for name, module in modules.items():
        own: Any = getattr(module, "saved_parts", None)
        for folder, part in ({name: module} if own is None else own()).items():
            top = folder.partition("/")[0]
            if folder in parts or top in _RUN_FOLDERS or top.startswith("checkpoint-"):
                raise ConfigurationError(
                    f"the method saves its module {name!r} into the folder {folder!r}, which is another part's or the "
                    "run's own: rename the module."
                )
            parts[folder] = (name, part)
    return parts


def check_method(method: TrainingMethod) -> None:
    """Refuse a method whose names, phases and saved parts do not fit together.

    Raises:
        ConfigurationError: naming the module or phase.
    """
    modules, names = method.modules, [phase.name for phase in method.phases]
    for name in (*modules, *names):
        check_name("the name of a module or phase of the method", name)
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"the method has the phases {names}, but needs one or several of different names.")
    trained = {name for phase in method.phases for name in phase.modules}
    if trained != modules.keys():
        raise ConfigurationError(
            f"the phases of the method train the modules {sorted(trained)}, but its modules are {sorted(modules)}: "
            "every module needs a phase, and every phase modules of the method."
        )
    saved = {id(value) for _, part in saved_parts(modules).values() for value in part.parameters()}
    for name, module in modules.items():
        lost = [key for key, value in module.named_parameters() if id(value) not in saved]
        if lost:
            raise ConfigurationError(
                f"the parameter {lost[0]!r} of the module {name!r} is in none of its saved_parts(): add the part."
            )
