"""What model cards state, as plain values: of a trained pipeline, and of a converted one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the result, as far as they are installed."""
    versions: dict[str, str] = {}
    for name in ("diffusers-srepa", "diffusers", "transformers", "accelerate", "torch"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@dataclass(frozen=True)
class ModelCardFacts:
    """What a card states about a run, or about the recipe of one.

    Args:
        model_name (`str`): size of the transformer, such as "SiT-XL/2".
        num_parameters (`int`): parameters of the transformer.
        resolution (`int`): side of the images in pixels.
        num_classes (`int`): number of classes, the null class not counted.
        dataset (`str`): Hub id or local path of the data.
        method (`str`): alignment preset, such as "srepa-mse".
        steps (`int`): optimiser steps of the saved weights.
        global_batch_size (`int`): images per step.
        learning_rate (`float`): learning rate (its maximum, under a schedule).
        ema_decay (`float`): decay of the averaged weights, which are the ones saved; 0 for no average.
        precision (`str`): "bf16", "fp16" or "fp32".
        vae (`str`, *optional*): Hub id or local path of the autoencoder; None or "pixels" for a model of pixels.
        teacher (`str`, *optional*): Hub id or local path of the vision encoder; None if none was used.
        further_teachers (`Mapping[str, str]`): the same of further encoders, by the names that terms use.
        depth (`int` or `str`, *optional*): aligned block, counted from 1, or the path of the aligned module; None if
            nothing was aligned.
        further_taps (`Mapping[str, int | str]`): the same of further taps, by name.
        terms (`Mapping[str, float | str]`): weights of the alignment terms by name, a schedule in words.
        objectives (`Sequence[str]`): what the terms ask for, in words.
        settings (`Mapping[str, str]`): further rows of the table of settings.
        init_from (`str`, *optional*): Hub id or local path of the pipeline that training started from.
        id2label (`Mapping[int | str, str]`, *optional*): class names by number.
        num_inference_steps (`int`): sampling steps of the example, as in the run's own validation.
        guidance_scale (`float`): guidance weight of the example, likewise.
        sample_grid (`str` or `os.PathLike`, *optional*): picture of samples; copied into the folder.
        losses (`Mapping[str, float]`): final training losses by name, raw, not weighted.
        metrics (`Mapping[str, float]`): measured metrics by name; empty if nothing was measured.
        hub_id (`str`, *optional*): repository that the card is for.
        license (`str`, *optional*): licence identifier of the weights; None if their owner has not chosen one.
        license_name, license_link (`str`, *optional*): which licence it is when `license` is "other".
        versions (`Mapping[str, str]`): versions of packages by name.
        recipe (`str`, *optional*): path in the source repository of the configuration that the card describes
            without any trained weights; None for the card of a pipeline.
        reported_results (`Sequence[Mapping[str, str]]`): results that the paper reports for these settings, each
            the columns of one row by name.
    """

    model_name: str
    num_parameters: int
    resolution: int
    num_classes: int
    dataset: str
    method: str
    steps: int
    global_batch_size: int
    learning_rate: float
    ema_decay: float
    precision: str
    vae: str | None = None
    teacher: str | None = None
    further_teachers: Mapping[str, str] = field(default_factory=dict)
    depth: int | str | None = None
    further_taps: Mapping[str, int | str] = field(default_factory=dict)
    terms: Mapping[str, float | str] = field(default_factory=dict)
    objectives: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    init_from: str | None = None
    id2label: Mapping[Any, str] | None = None
    num_inference_steps: int = 250
    guidance_scale: float = 1.0
    sample_grid: str | os.PathLike[str] | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    hub_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    versions: Mapping[str, str] = field(default_factory=package_versions)
    recipe: str | None = None
    reported_results: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class ConvertedCardFacts:
    """What a card states about a pipeline that comes from an official checkpoint.

    Args:
        format (`str`): "sit", "repa", "irepa" or "reg".
        model_name (`str`): size of the transformer, such as "SiT-XL/2".
        num_parameters (`int`): parameters of the transformer.
        num_classes (`int`): number of classes, the null class not counted.
        channels (`int`): channels of the latents.
        latent_size (`str`): height and width of the latents, such as "32 x 32".
        source (`str`, *optional*): "ema" or "model"; None for a bare state dict.
        steps (`int`, *optional*): training steps, if the checkpoint says them.
        guidance_channels (`int`, *optional*): the pipeline's default.
        projectors (`Sequence[str]`): names of the projectors.
        encoder_depth (`int`, *optional*): block that they read, counted from 1, if it is known.
        id2label (`Mapping[int | str, str]`, *optional*): class names by number.
        hub_id (`str`, *optional*): repository that the card is for.
    """

    format: str
    model_name: str
    num_parameters: int
    num_classes: int
    channels: int
    latent_size: str
    source: str | None = None
    steps: int | None = None
    guidance_channels: int | None = None
    projectors: Sequence[str] = ()
    encoder_depth: int | None = None
    id2label: Mapping[Any, str] | None = None
    hub_id: str | None = None
