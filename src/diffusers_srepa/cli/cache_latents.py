"""`diffusers-srepa cache-latents`: encode a dataset once, for training with `--data.latent_cache`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers_srepa.configuration.command_line import parse_config
from diffusers_srepa.configuration.options import Options, hints_of, option
from diffusers_srepa.configuration.sections import ImagesConfig, LatentsConfig
from diffusers_srepa.configuration.sweeps import read_run_files
from diffusers_srepa.configuration.training import DEFAULT_METHOD, TrainingConfig
from diffusers_srepa.configuration.values import check_names
from diffusers_srepa.errors import ConfigurationError, in_options
from diffusers_srepa.training.methods.registry import METHOD_CONFIGS


DESCRIPTION = (
    "Encode every image of a dataset and store mean and standard deviation of its latents. --config takes the "
    "configuration of a training run, of which data and latents are read. A stopped run continues where it was; under "
    "`accelerate launch -m diffusers_srepa.cli` the processes share the work."
)


@dataclass
class CacheLatentsOptions(Options):
    """What is encoded, with what, and where it goes."""

    output_dir: str = option(help="Folder of the cache; of the command line only, as a training file's is the run's.")
    flip: bool = option(
        False,
        "Also store the latents of the flipped images; by default if a file says data.horizontal_flip.",
        also=("horizontal_flip", "random_flip"),
    )
    dtype: Literal["float16", "float32"] = option("float16", "Precision of the cache.")
    batch_size: int = option(32, "Images encoded at a time.", minimum=1)
    verify: bool = option(False, "Only check the cache that is in output_dir, shard by shard; nothing is written.")
    num_workers: int = option(4, "Loader processes.", minimum=0, also=("dataloader_num_workers",))
    data: ImagesConfig = option(default_factory=ImagesConfig, help="The images.")
    latents: LatentsConfig = option(default_factory=LatentsConfig, help="The autoencoder.")

    def validate(self) -> None:
        """As for every command, and that there is a dataset to encode."""
        if not self.data.dataset and not self.verify:
            raise ConfigurationError("no dataset is given: set --data.dataset to a Hub id or a local folder.")
        super().validate()


def read_files(files: Sequence[str | Path], variant: str | None, config_class: type) -> dict[str, Any]:
    """The options of the command that files give, which may be those of a training run; as [`read_run_files`].

    A name is refused that is an option neither of the command, `config_class`, nor of a training run.
    """
    method = read_run_files(files, variant).get("method", DEFAULT_METHOD)
    run_class: type = METHOD_CONFIGS.get(str(method), TrainingConfig)
    values = read_run_files(files, variant, run_class)
    only_here = hints_of(config_class).keys() - hints_of(run_class).keys()
    check_names({name: value for name, value in values.items() if name not in only_here}, run_class)
    chosen = {name: value for name, value in values.items() if name in only_here}
    for name in ("data", "latents"):
        section = values.get(name)
        if isinstance(section, Mapping):
            known = hints_of(hints_of(config_class)[name])
            chosen[name] = {key: value for key, value in section.items() if key in known}
            if section.get("horizontal_flip"):
                chosen.setdefault("flip", True)
        elif name in values:
            chosen[name] = section
    return chosen


def run(argv: Sequence[str], prog: str) -> None:
    """Write the cache, or check it."""
    options = parse_config(argv, CacheLatentsOptions, prog, DESCRIPTION, read_files=read_files)
    names = {name: f"--{name}" for name in hints_of(CacheLatentsOptions)}
    if options.verify:
        from diffusers_srepa.data.latent_cache.read import LatentCache

        with in_options(names | {"latent_cache": "--output_dir"}):
            cache = LatentCache.open(options.output_dir, verify=True)
        found = (
            "sizes are right, it has no checksums" if cache.checksums is None else "contents are as they were written"
        )
        sys.stdout.write(
            f"{options.output_dir}: {cache.layout.num_shards} shards, {cache.layout.rows} rows; {found}\n"
        )
        return
    place, source = Path(options.output_dir), Path(str(options.data.dataset)).expanduser()
    if source.is_dir() and source.resolve() in (place.resolve(), *place.resolve().parents):
        raise ConfigurationError(f"--output_dir {place} lies in the dataset {source}: set it to a folder elsewhere.")

    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from diffusers_srepa.data.datasets import load_image_dataset
    from diffusers_srepa.data.image_dataset import ImageDataset
    from diffusers_srepa.data.latent_cache.write import cache_latents, check_cache_folder
    from diffusers_srepa.latents.loading import load_latent_space

    with in_options(names):
        check_cache_folder(place)
    # Without being told, it takes processes on the CPU for runs of their own.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    latents, images = options.latents, dict(vars(options.data))
    with in_options({"name_or_path": "--latents.vae", "subfolder": "--latents.subfolder"}):
        dtype, where = getattr(torch, latents.dtype), {"subfolder": latents.subfolder, "revision": latents.revision}
        latent_space = load_latent_space(latents.vae, dtype=dtype, **where)
    names |= {name: f"--data.{name}" for name in hints_of(ImagesConfig)} | {"name_or_path": "--data.dataset"}
    with in_options(names):
        with state.main_process_first():
            dataset = load_image_dataset(images.pop("dataset"), **images)
        assert isinstance(dataset, ImageDataset), "a dataset that is not streamed has rows by number"
        cache_latents(
            dataset,
            latent_space,
            options.output_dir,
            flip=options.flip,
            dtype=options.dtype,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            process_index=state.process_index,
            num_processes=state.num_processes,
            device=state.device,
            show_progress=state.is_main_process,
        )
