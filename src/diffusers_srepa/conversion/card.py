"""The model card of a converted pipeline: what it is, where it comes from, how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


CARD_FILE = "README.md"
PAPERS = {
    "sit": ("SiT", "2401.08740"),
    "repa": ("REPA", "2410.06940"),
    "irepa": ("iREPA", "2512.10794"),
    "reg": ("REG", "2507.01467"),
}

_TEMPLATE = Path(__file__).with_name("converted_card_template.md")


@dataclass(frozen=True)
class ConversionFacts:
    """What a card states.

    Args:
        format (`str`): "sit", "repa", "irepa" or "reg".
        model_name (`str`): size of the transformer, such as "SiT-XL/2".
        num_parameters (`int`): parameters of the transformer.
        num_classes (`int`): classes, the null class not counted.
        channels (`int`): channels of the latents.
        latent_size (`str`): height and width of the latents, such as "32 x 32".
        source (`str`, *optional*): "ema" or "model"; None for a bare state dict.
        steps (`int`, *optional*): training steps, if the checkpoint says them.
        guidance_channels (`int`, *optional*): the pipeline's default.
        projectors (`tuple[str, ...]`): names of the projectors.
        encoder_depth (`int`, *optional*): block that they read, counted from 1, if it is known.
        example_class (`str`, *optional*): name of the class in the example; class 0 without one.
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
    projectors: tuple[str, ...] = ()
    encoder_depth: int | None = None
    example_class: str | None = None
    hub_id: str | None = None


def write_card(folder: Path, facts: ConversionFacts) -> None:
    """Write `folder/README.md`, with no path of this machine in it."""
    method, paper = PAPERS[facts.format]
    card = ModelCard.from_template(
        ModelCardData(
            library_name="diffusers",
            pipeline_tag="unconditional-image-generation",
            tags=["class-to-image", "image-generation", "flow-matching", "sit"]
            + ([] if facts.format == "sit" else ["representation-alignment", facts.format]),
        ),
        template_path=str(_TEMPLATE),
        facts=facts,
        method=method,
        paper=paper,
        title=facts.hub_id.split("/")[-1] if facts.hub_id else f"{facts.model_name}, converted from {method}",
        load_from=facts.hub_id or ".",
        # A JSON string is a Python string too.
        example_label="0" if facts.example_class is None else json.dumps(facts.example_class, ensure_ascii=False),
    )
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
