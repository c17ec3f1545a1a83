"""The training data of a run, as its configuration and its method ask for them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from diffusers_srepa.configuration.sections import DataConfig
from diffusers_srepa.configuration.training import RunConfig
from diffusers_srepa.data.datasets import load_image_dataset
from diffusers_srepa.data.order import GlobalBatchSampler
from diffusers_srepa.errors import ConfigurationError, in_options
from diffusers_srepa.training.method import TrainingMethod


DATA_OPTIONS = {
    **{field.name: f"data.{field.name}" for field in fields(DataConfig)},
    "name_or_path": "data.dataset",
    "encoder_id": "latents.vae",
    "num_classes": "model.num_classes",
    "global_batch_size": "training.global_batch_size",
    "micro_batch_size": "training.micro_batch_size",
    "resume_from_checkpoint": "--resume_from_checkpoint latest",
    "resume_with_changes": "--resume_with_changes",
}
"""The options by the names of the arguments that the functions of `data` have for them."""


def load_dataset(config: RunConfig, method: TrainingMethod, accelerator: Accelerator, given: Any = None) -> Any:
    """The training items, with moments from the latent cache if one is given.

    Args:
        config (`RunConfig`): the run's.
        method (`TrainingMethod`): says whether images are needed, and which latents.
        accelerator (`Accelerator`): the main process downloads first.
        given (*optional*): a dataset of the datasets library, or of training items, which is taken as it is.

    Raises:
        ConfigurationError, DataError: what does not exist or does not fit, naming the option to change.
    """
    data, space = config.data, method.latent_space
    if given is None or isinstance(given, Dataset | IterableDataset):
        with accelerator.main_process_first(), in_options(DATA_OPTIONS):
            dataset = load_image_dataset(
                str(data.dataset) if given is None else given,
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
                transparent_color=data.transparent_color,
                seed=config.seed,
                cache_dir=data.cache_dir,
                latent_cache=data.latent_cache,
                encoder_id=space.encoder_id if data.latent_cache and space is not None else None,
                need_pixels=method.needs_images or data.latent_cache is None,
            )
    else:
        dataset = given
        missing = [name for name in ("num_classes", "id2label", "fingerprint") if not hasattr(dataset, name)]
        if missing:
            raise ConfigurationError(
                f"the dataset is a {type(dataset).__name__} without {', '.join(missing)}, but must be a "
                "datasets.Dataset or have them: the number of classes, their names or None, and a text that changes "
                "with the content."
            )
    if not isinstance(dataset, TorchIterableDataset):
        # The sampler refuses a dataset that cannot fill one global batch; better now than at the first step.
        batch = config.training.global_batch_size
        with in_options(DATA_OPTIONS):
            GlobalBatchSampler(len(dataset), batch, batch, config.seed)
    return dataset
