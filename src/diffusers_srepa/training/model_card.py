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

from diffusers_srepa.training.licence_notes import licence_note


CARD_FILE = "README.md"
SAMPLE_GRID_FILE = "sample_grid.png"
TEMPLATE = Path(__file__).with_name("model_card_template.md")

# The loaders of `datasets` that read local files; they have the form of a dataset's name.
_FILE_LOADERS = {"arrow", "audiofolder", "csv", "imagefolder", "json", "parquet", "text", "webdataset"}
# What `data.dataset` and `latents.vae` take besides repositories and folders.
_WORDS = _FILE_LOADERS | {"pixels"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.(arrow|bin|ckpt|json|jsonl|npz|parquet|pt|pth|safetensors|tar|ya?ml|zip)", re.IGNORECASE)
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|credentials?|api_key|authorization)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{8,}")
_LOCAL_KEY = re.compile(r"(_dir|_cache|_file|_folder|^base|^resume_from_checkpoint)$")
# Options that name a repository or a folder; the value may be a bare folder name.
_SOURCE_KEY = re.compile(r"^(dataset|vae|name_or_path|init_from)$")
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
    text = render_model_card(config=config, facts=facts, sample_grid=_copy_sample_grid(facts.sample_grid, folder))
    path = folder / CARD_FILE
    # ModelCard.save writes the platform's encoding.
    path.write_text(text, encoding="utf-8")
    return path


def render_model_card(*, config: Mapping[str, Any], facts: ModelCardFacts, sample_grid: str | None = None) -> str:
    """The text of a card.

    Args:
        config (`Mapping[str, Any]`): the resolved configuration as nested plain values; shown without secrets and
            local paths.
        facts (`ModelCardFacts`): what the card states.
        sample_grid (`str`, *optional*): the picture of samples as seen from the card.
    """
    teachers = {"": facts.teacher} if facts.teacher else {}
    teachers |= facts.further_teachers
    card = ModelCard.from_template(
        _card_data(facts),
        template_path=str(TEMPLATE),
        facts=facts,
        title=_text(facts.hub_id.split("/")[-1] if facts.hub_id else f"{facts.model_name}, {facts.method}"),
        load_from=facts.hub_id or (f"runs/{Path(facts.recipe).stem}" if facts.recipe else "."),
        example_label=_example_label(facts.id2label),
        class_names=_class_names(facts.id2label),
        dataset=_source(facts.dataset, "dataset", "datasets/"),
        vae=_source(facts.vae, "autoencoder") if in_latents(facts) else None,
        teachers={_text(name): _source(teacher, "vision encoder") for name, teacher in teachers.items()},
        init=_source(facts.init_from, "pipeline") if facts.init_from else None,
        aligned=_aligned_rows(facts),
        settings={_text(name): _text(value) for name, value in facts.settings.items()},
        reported=_table(facts.reported_results),
        sample_grid=sample_grid,
        config_yaml=public_yaml(config),
    )
    return f"{str(card).rstrip()}\n"


def in_latents(facts: ModelCardFacts) -> bool:
    """Whether the model works in the latents of an autoencoder."""
    return facts.vae not in (None, "pixels")


def public_id(name: str | None) -> str | None:
    """`name` if it is the id of a Hub repository, None if it is a local path, a URL or a loader of local files."""
    if not name or not _HUB_ID.fullmatch(name) or name in _FILE_LOADERS or _FILE_SUFFIX.search(name):
        return None
    return None if os.path.exists(name) else name


def public_yaml(config: Mapping[str, Any]) -> str:
    """`public_config` as YAML, without the line break at the end."""
    return yaml.safe_dump(public_config(config), sort_keys=False, allow_unicode=True).strip()


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
    is_folder = _SOURCE_KEY.search(key) is not None and value not in _WORDS and os.path.exists(value)
    return "(local)" if is_folder or _LOCAL_KEY.search(key) or _looks_local(value) else value


def _looks_local(value: str) -> bool:
    if value.startswith(("/", "~", "./", "../", "file:")) or value in (".", "..") or "\\" in value:
        return True
    if "://" in value or value.count("/") > 1:
        return True
    # Without a slash, as in the split "train", it is no path even where a file happens to have that name.
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


def _source(name: str | None, noun: str, prefix: str = "") -> dict[str, str | None]:
    """How to name a dataset or model that the run used, and what is known about its terms."""
    repo_id = public_id(name)
    link = f"[{repo_id}](https://huggingface.co/{prefix}{repo_id})" if repo_id else f"a local {noun}"
    return {"link": link, "note": licence_note(repo_id)}


def _table(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Head and body of a table with a column for every key; empty without rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [columns, *([_text(row.get(name, "–")) for name in columns] for row in rows)] if rows else []


def _aligned_rows(facts: ModelCardFacts) -> dict[str, str]:
    """Rows of the table of settings: what is aligned, the main tap first."""
    taps = {"": facts.depth} if facts.depth is not None else {}
    rows: dict[str, str] = {}
    for name, tap in {**taps, **facts.further_taps}.items():
        kind = "block" if isinstance(tap, int) else "module"
        label = f"Aligned {kind}" + (f" `{_text(name)}`" if name else "")
        rows[label] = f"{tap} (counted from 1)" if isinstance(tap, int) else f"`{_text(tap)}`"
    return rows


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
