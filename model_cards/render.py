"""Write the cards of the main recipes, `sit-{b,l,xl}-2_256_srepa-{mse,kl}.md`, beside this script.

    python model_cards/render.py

They come from the template that runs write their own cards with, from the configurations in `examples/configs`, and
from the figures of the paper in `docs/paper_settings.md`. Run it after changing any of these.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from diffusers_srepa import SiTTransformer2DModel
from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.publishing.model_card import render_model_card
from diffusers_srepa.training.card_facts import facts_from_config
from diffusers_srepa.training.methods.card_facts import alignment_facts


HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "examples/configs"
PAGE = HERE.parent / "docs/paper_settings.md"
IMAGENET_CLASSES = 1000

# What a recipe is, without where a run writes, how often it saves and whom it tells.
SHAPING = ("seed", "model", "latents", "teacher", "teachers", "alignment", "flow", "data", "optimizer", "training")
SHAPING += ("sampling",)

# The rows of docs/paper_settings.md that are runs of a recipe: table, configuration, variant.
RECIPES: dict[str, list[tuple[str, str, str | None]]] = {
    "sit-b-2_256_srepa-mse": [("Table 6", "sweeps/table6_encoders.yaml", "dinov2-b")],
    "sit-b-2_256_srepa-kl": [("Table 9", "sweeps/table9_weights_kl.yaml", "proj_1.0_struct_0.5")],
    "sit-l-2_256_srepa-mse": [("Table 1", "sit-l-2_256_srepa-mse.yaml", None)],
    "sit-l-2_256_srepa-kl": [],
    "sit-xl-2_256_srepa-mse": [
        ("Table 1", "sit-xl-2_256_srepa-mse.yaml", None),
        ("Table 2", "sweeps/table2_guided_sampling.yaml", "srepa-mse_80_epochs"),
    ],
    "sit-xl-2_256_srepa-kl": [],
}


def load_recipe(config: str, variant: str | None = None) -> TrainingConfig:
    """The resolved run of a file of `examples/configs`, its output folder left open."""
    arguments = ["--config", str(CONFIGS / config), *(["--variant", variant] if variant else [])]
    return load_training_config(arguments, validate=False)


def read_page_row(table: str, config: str, variant: str | None) -> dict[str, str]:
    """The cells of one row of docs/paper_settings.md by column."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {table}:")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip().strip("`") for cell in line] for line in lines]
    rows = [dict(zip(head, cells, strict=True)) for cells in body]
    (row,) = [row for row in rows if row["config"].startswith(f"[{config}]") and row["variant"] == (variant or "–")]
    return row


def reported_results(recipe: str) -> list[dict[str, str]]:
    """What the paper reports for a recipe: where, after how many steps, with which guidance, and its metrics."""
    results = []
    for table, config, variant in RECIPES[recipe]:
        row = read_page_row(table, config, variant)
        metrics = {name.removeprefix("paper "): value for name, value in row.items() if name.startswith("paper ")}
        results.append({"paper": table, "steps": row["steps"], "guidance": row.get("w", "none"), **metrics})
    return results


def render(recipe: str) -> str:
    """The card of a recipe."""
    config = load_recipe(f"{recipe}.yaml")
    # Without storage: only names and sizes are needed.
    with torch.device("meta"):
        transformer = SiTTransformer2DModel.from_preset(config.model.preset, num_classes=IMAGENET_CLASSES)
    facts = facts_from_config(
        config,
        transformer,
        **alignment_facts(config, transformer),
        versions={},
        recipe=f"examples/configs/{recipe}.yaml",
        reported_results=reported_results(recipe),
    )
    shown = {name: value for name, value in config.to_dict().items() if name in SHAPING}
    return render_model_card(config=shown, facts=facts)


def main() -> None:
    """Write all cards."""
    for recipe in RECIPES:
        (HERE / f"{recipe}.md").write_text(render(recipe), encoding="utf-8")
        sys.stdout.write(f"wrote model_cards/{recipe}.md\n")


if __name__ == "__main__":
    main()
