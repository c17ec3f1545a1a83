"""What is wrong with names in a configuration, and what its open values stand for; both need the models' code."""

from __future__ import annotations

from diffusers_srepa.alignment.presets import default_depth
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import in_options
from diffusers_srepa.files import check_name


def check_names(config: TrainingConfig) -> None:
    """Refuse an unknown model preset, and alignment terms that name or hold what does not exist.

    Raises:
        ConfigurationError: with close names.
    """
    # Imported here, so that what only prints help stays quick.
    from diffusers_srepa.alignment.registry import build_terms
    from diffusers_srepa.models.presets import find_preset

    with in_options({"preset": "option model.preset"}):
        find_preset(config.model.preset)
    alignment = config.alignment
    named = {
        "alignment.taps": alignment.taps,
        "alignment.projectors": alignment.projectors,
        "teachers": config.teachers,
    }
    for section, names in named.items():
        for name in names:
            check_name(f"a name in {section}", name)
    terms = {name: term for name, term in config.alignment.terms.items() if term is not None}
    build_terms(terms, config.alignment.target_transform)


def explain_open_values(config: TrainingConfig) -> str:
    """YAML comments for under a printed configuration: sizes and depth, where presets decide them.

    Raises:
        ConfigurationError: as [`check_names`].
    """
    from diffusers_srepa.models.presets import find_preset

    check_names(config)
    model, alignment = config.model, config.alignment
    if model.init_from is not None:
        return f"# The sizes of the model are those of {model.init_from}.\n"
    preset = find_preset(model.preset)[1]
    given = {name: getattr(model, name, None) for name in preset}
    sizes = {name: preset[name] if value is None else value for name, value in given.items()}
    nulls = [f"model.{name}: {sizes[name]}" for name, value in given.items() if value is None]
    if any(alignment.terms.values()) and alignment.depth is None and alignment.tap is None:
        # Of a size that is given in other terms only the built model tells.
        if {"num_layers", "num_attention_heads", "attention_head_dim"} <= sizes.keys():
            width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
            nulls.append(f"alignment.depth: {default_depth(sizes['num_layers'], width)}")
    if not nulls:
        return ""
    return "# Left open above and decided by the presets:\n" + "".join(f"#   {line}\n" for line in nulls)
