"""The model card of a trained pipeline: what it is, how it was trained, how to load it; see `model_card_template.md`.

A card is public. Names of the Hub are linked, everything local is called "local": no path of the training machine and
nothing that looks like a secret gets into it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData


CARD_FILE = "README.md"
SAMPLE_GRID_FILE = "sample_grid.png"
TEMPLATE = Path(__file__).with_name("model_card_template.md")

# The loaders of `datasets` that read local files; they have the form of a dataset's name.
_FILE_LOADERS = {"arrow", "audiofolder", "csv", "imagefolder", "json", "parquet", "text", "webdataset"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.(arrow|bin|ckpt|json|jsonl|npz|parquet|pt|pth|safetensors|tar|ya?ml|zip)", re.IGNORECASE)
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|credentials?|api_key|authorization)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{8,}")
_LOCAL_KEY = re.compile(r"(_dir|_cache|_file|_folder|^base|^resume_from_checkpoint)$")
_SHOWN_CLASS_NAMES = 10


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the result, as far as they are installed."""
    versions: dict[str, str] = {}
    for name in ("diffusers-srepa", "diffusers", "transformers", "accelerate", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class ModelCardFacts:
    """What a card states about a run.

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
        depth (`int`, *optional*): aligned block, counted from 1; None if nothing was aligned.
        terms (`Mapping[str, float]`): weights of the alignment terms by name, at the start of training.
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
    depth: int | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
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


def write_model_card(folder: str | os.PathLike[str], *, config: Mapping[str, Any], facts: ModelCardFacts) -> Path:
    """Write the card of a finished pipeline as `folder/README.md`.

    Args:
        folder (`str` or `os.PathLike`): the pipeline's folder.
        config (`Mapping[str, Any]`): the resolved configuration as nested plain values; shown without secrets and
            local paths.
        facts (`ModelCardFacts`): what the card states.

    Returns:
        `Path`: the written file.
    """
    folder = Path(folder)
    card = ModelCard.from_template(
        _card_data(facts),
        template_path=str(TEMPLATE),
        facts=facts,
        title=_text(facts.hub_id.split("/")[-1] if facts.hub_id else f"{facts.model_name}, {facts.method}"),
        load_from=facts.hub_id or ".",
        example_label=_example_label(facts.id2label),
        class_names=_class_names(facts.id2label),
        dataset_link=_link(facts.dataset, "dataset", "datasets/"),
        vae_link=_link(facts.vae, "autoencoder") if in_latents(facts) else None,
        teacher_link=_link(facts.teacher, "vision encoder") if facts.teacher else None,
        init_link=_link(facts.init_from, "pipeline") if facts.init_from else None,
        sample_grid=_copy_sample_grid(facts.sample_grid, folder),
        config_yaml=yaml.safe_dump(public_config(config), sort_keys=False, allow_unicode=True).strip(),
    )
    path = folder / CARD_FILE
    # ModelCard.save writes the platform's encoding.
    path.write_text(str(card), encoding="utf-8")
    return path


def in_latents(facts: ModelCardFacts) -> bool:
    """Whether the model works in the latents of an autoencoder."""
    return facts.vae not in (None, "pixels")


def public_id(name: str | None) -> str | None:
    """`name` if it is the id of a Hub repository, None if it is a local path, a URL or a loader of local files."""
    if not name or not _HUB_ID.fullmatch(name) or name in _FILE_LOADERS or _FILE_SUFFIX.search(name):
        return None
    return None if os.path.exists(name) else name


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested configuration without secrets, local paths replaced by "(local)"."""
    return {str(key): _public_value(str(key), value) for key, value in config.items() if not _is_secret(key, value)}


def _is_secret(key: Any, value: Any) -> bool:
    # A flag such as `drop_class_token` is no secret.
    return isinstance(value, str) and _SECRET_KEY.search(str(key)) is not None


def _public_value(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_config(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_public_value(key, entry) for entry in value]
    if isinstance(value, os.PathLike):
        return "(local)"
    if not isinstance(value, str):
        return value if isinstance(value, bool | int | float) or value is None else _public_value(key, str(value))
    if _SECRET_VALUE.search(value):
        return "(removed)"
    return "(local)" if _LOCAL_KEY.search(key) or _looks_local(value) else value


def _looks_local(value: str) -> bool:
    if value.startswith(("/", "~", "./", "../", "file:")) or value in (".", "..") or "\\" in value:
        return True
    if "://" in value or value.count("/") > 1:
        return True
    # A value without a slash, such as "train", is no path even where a file happens to have that name.
    return "/" in value and os.path.exists(value)


def _card_data(facts: ModelCardFacts) -> ModelCardData:
    dataset, base = public_id(facts.dataset), public_id(facts.init_from)
    # Neither teacher nor autoencoder is a base model in the Hub's sense: the weights do not descend from them.
    relation: dict[str, Any] = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        datasets=[dataset] if dataset else None,
        tags=["class-to-image", "image-generation", "flow-matching", "sit", *_method_tags(facts.method)],
        **relation,
    )


def _method_tags(method: str) -> list[str]:
    """Tags of a preset: "irepa+srepa" is both methods, "structure-kl" is a form of sREPA, "sit" has no alignment."""
    families = [{"structure": "srepa"}.get(part.split("-")[0], part.split("-")[0]) for part in method.split("+")]
    tags = [family for family in families if re.fullmatch(r"\w+", family) and family != "sit"]
    return ["representation-alignment", *tags] if tags else []


def _link(name: str | None, noun: str, prefix: str = "") -> str:
    repo_id = public_id(name)
    if repo_id is None:
        return f"a local {noun}"
    return f"[{repo_id}](https://huggingface.co/{prefix}{repo_id})"


def _text(value: object) -> str:
    """A value on one line, harmless inside a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _sorted_names(id2label: Mapping[Any, str]) -> list[tuple[int, str]]:
    return sorted((int(number), name) for number, name in id2label.items())


def _example_label(id2label: Mapping[Any, str] | None) -> str:
    """A class as Python source: its name where that names one class only, else its number."""
    if not id2label:
        return "0"
    number, entry = _sorted_names(id2label)[0]
    name = " ".join(entry.split(",")[0].split())
    owners = [other for other in id2label.values() if name.casefold() in _synonyms(other)]
    # A JSON string without escapes is a Python string too.
    return json.dumps(name, ensure_ascii=False) if name and name.isprintable() and len(owners) == 1 else str(number)


def _synonyms(entry: str) -> set[str]:
    return {" ".join(name.split()).casefold() for name in (entry, *entry.split(","))}


def _class_names(id2label: Mapping[Any, str] | None) -> str | None:
    if not id2label:
        return None
    names = [f"{number}: {_text(name)}" for number, name in _sorted_names(id2label)]
    more = f"; and {len(names) - _SHOWN_CLASS_NAMES} more" if len(names) > _SHOWN_CLASS_NAMES else ""
    return "; ".join(names[:_SHOWN_CLASS_NAMES]) + more


def _copy_sample_grid(sample_grid: str | os.PathLike[str] | None, folder: Path) -> str | None:
    """Bring the picture into the folder, where the card can show it; its name there, or None without one."""
    if sample_grid is None or not Path(sample_grid).is_file():
        return None
    target = folder / SAMPLE_GRID_FILE
    if Path(sample_grid).resolve() != target.resolve():
        shutil.copyfile(sample_grid, target)
    return target.name
