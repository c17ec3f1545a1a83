"""Model cards, `README.md` of a pipeline's folder: of a trained pipeline, of a recipe, and of a converted one.

The text is in the templates beside this file. A card is public: names of the Hub are linked, everything local is
called "local", and nothing that looks like a secret gets into it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from diffusers_srepa.publishing.card_facts import ConvertedCardFacts, ModelCardFacts
from diffusers_srepa.publishing.licences import describe_source
from diffusers_srepa.publishing.redaction import public_id, public_yaml


CARD_FILE = "README.md"
SAMPLE_GRID_FILE = "sample_grid.png"

_TAGS = ("class-to-image", "image-generation", "flow-matching", "sit")
_PAPERS = {
    "sit": ("SiT", "2401.08740"),
    "repa": ("REPA", "2410.06940"),
    "irepa": ("iREPA", "2512.10794"),
    "reg": ("REG", "2507.01467"),
}
_SHOWN_CLASS_NAMES = 10


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    facts: ModelCardFacts | ConvertedCardFacts,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write the card of a finished pipeline, see [`render_model_card`], as `folder/README.md`; the file's path.

    The picture of samples is copied into the folder.
    """
    folder = Path(folder)
    grid = _copy_sample_grid(facts.sample_grid, folder) if isinstance(facts, ModelCardFacts) else None
    path = folder / CARD_FILE
    # ModelCard.save writes the platform's encoding.
    path.write_text(render_model_card(facts=facts, config=config, sample_grid=grid), encoding="utf-8")
    return path


def render_model_card(
    *,
    facts: ModelCardFacts | ConvertedCardFacts,
    config: Mapping[str, Any] | None = None,
    sample_grid: str | None = None,
) -> str:
    """The text of a card.

    Args:
        facts (`ModelCardFacts` or `ConvertedCardFacts`): what the card states.
        config (`Mapping[str, Any]`, *optional*): the resolved configuration of a run as nested plain values; shown
            without secrets and local paths.
        sample_grid (`str`, *optional*): the picture of samples as seen from the card.
    """
    if isinstance(facts, ConvertedCardFacts):
        template, data, values = "converted_card_template.md", *_converted(facts)
    else:
        template, data, values = "model_card_template.md", *_trained(facts)
    card = ModelCard.from_template(
        ModelCardData(library_name="diffusers", pipeline_tag="unconditional-image-generation", **data),
        template_path=str(Path(__file__).with_name(template)),
        facts=facts,
        example_label=_example_label(facts.id2label),
        sample_grid=sample_grid,
        config_yaml=public_yaml(config or {}),
        **values,
    )
    return f"{str(card).rstrip()}\n"


def _trained(facts: ModelCardFacts) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data at the top of the card of a trained pipeline, and what its template needs besides the facts."""
    dataset, base = public_id(facts.dataset), public_id(facts.init_from)
    data: dict[str, Any] = {
        "license": facts.license,
        "license_name": facts.license_name,
        "license_link": facts.license_link,
        "datasets": [dataset] if dataset else None,
        "tags": [*_TAGS, *_method_tags(facts.method)],
    }
    if base:
        # Neither teacher nor autoencoder is a base model in the Hub's sense: the weights do not descend from them.
        data |= {"base_model": base, "base_model_relation": "finetune"}
    teachers = ({"": facts.teacher} if facts.teacher else {}) | dict(facts.further_teachers)
    return data, {
        "title": _text(facts.hub_id.split("/")[-1] if facts.hub_id else f"{facts.model_name}, {facts.method}"),
        "load_from": facts.hub_id or (f"runs/{Path(facts.recipe).stem}" if facts.recipe else "."),
        "class_names": _class_names(facts.id2label),
        "dataset": describe_source(facts.dataset, "dataset", "datasets/"),
        "vae": None if facts.vae in (None, "pixels") else describe_source(facts.vae, "autoencoder"),
        "teachers": {_text(name): describe_source(source, "vision encoder") for name, source in teachers.items()},
        "init": describe_source(facts.init_from, "pipeline") if facts.init_from else None,
        "aligned": _aligned_rows(facts),
        "settings": {_text(name): _text(value) for name, value in facts.settings.items()},
        "reported": _table(facts.reported_results),
    }


def _converted(facts: ConvertedCardFacts) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same two for a converted pipeline."""
    method, paper = _PAPERS[facts.format]
    return {"tags": [*_TAGS, *_method_tags(facts.format)]}, {
        "title": facts.hub_id.split("/")[-1] if facts.hub_id else f"{facts.model_name}, converted from {method}",
        "load_from": facts.hub_id or ".",
        "method": method,
        "paper": paper,
    }


def _method_tags(method: str) -> list[str]:
    """Tags of a preset: "irepa+srepa" is both methods, "structure-kl" is a form of sREPA, "sit" has no alignment."""
    families = [{"structure": "srepa"}.get(part.split("-")[0], part.split("-")[0]) for part in method.split("+")]
    tags = [family for family in families if re.fullmatch(r"\w+", family) and family != "sit"]
    return ["representation-alignment", *tags] if tags else []


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


def _example_label(id2label: Mapping[Any, str] | None) -> str:
    """A class as Python source: its name where that names one class only, else its number."""
    if not id2label:
        return "0"
    number, entry = min((int(number), name) for number, name in id2label.items())
    name = " ".join(entry.split(",")[0].split())
    owners = [other for other in id2label.values() if name.casefold() in _synonyms(other)]
    # A JSON string without escapes is a Python string too.
    return json.dumps(name, ensure_ascii=False) if name and name.isprintable() and len(owners) == 1 else str(number)


def _synonyms(entry: str) -> set[str]:
    return {" ".join(name.split()).casefold() for name in (entry, *entry.split(","))}


def _class_names(id2label: Mapping[Any, str] | None) -> str | None:
    if not id2label:
        return None
    ordered = sorted((int(number), name) for number, name in id2label.items())
    names = [f"{number}: {_text(name)}" for number, name in ordered]
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
