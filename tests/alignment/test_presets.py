"""The methods of the paper: their weights, parts and depths."""

import json
import subprocess
import sys

import pytest
import torch

from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramKLAlignment, GramMSEAlignment
from diffusers_srepa.alignment.presets import (
    DEFAULT_PRESET,
    METHOD_PRESETS,
    alignment_preset,
    default_depth,
    get_preset,
)
from diffusers_srepa.alignment.projectors import ConvProjector, MLPProjector
from diffusers_srepa.alignment.registry import build_projector, build_target_transform, build_terms
from diffusers_srepa.alignment.spatial_norm import SpatialNorm
from diffusers_srepa.errors import ConfigurationError


# lambda_proj, the structural objective and lambda_struct, the projector, the class token's weight.
EXPECTED = {
    "sit": (None, None, None, None, None),
    "repa": (0.5, None, None, MLPProjector, None),
    "irepa": (1.0, None, None, ConvProjector, None),
    "reg": (0.5, None, None, MLPProjector, 0.03),
    "srepa-mse": (1.0, GramMSEAlignment, 2.0, MLPProjector, None),
    "srepa-kl": (1.0, GramKLAlignment, 0.5, MLPProjector, None),
    "structure-mse": (None, GramMSEAlignment, 4.0, MLPProjector, None),
    "structure-kl": (None, GramKLAlignment, 0.5, MLPProjector, None),
    "irepa+srepa": (1.0, GramMSEAlignment, 2.0, ConvProjector, None),
    "reg+srepa": (0.5, GramMSEAlignment, 2.0, MLPProjector, 0.03),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_weights_and_parts(name):
    cosine, structure, structure_weight, projector, class_token_weight = EXPECTED[name]
    preset = METHOD_PRESETS[name]
    terms = build_terms(preset.terms, preset.target_transform)
    assert preset.class_token_weight == class_token_weight
    assert len(terms) == (cosine is not None) + (structure is not None)
    if cosine is not None:
        assert isinstance(terms["cosine"].objective, CosineAlignment) and terms["cosine"].schedule(0) == cosine
    for term_name in set(terms) - {"cosine"}:
        assert isinstance(terms[term_name].objective, structure)
        assert terms[term_name].schedule(0) == structure_weight
        assert terms[term_name].feature == ("default", "default")
    if structure is GramKLAlignment:
        objective = terms["gram_kl"].objective
        assert (objective.tau_teacher, objective.tau_student, objective.reduction) == (0.2, 0.2, "mean")
    with torch.device("meta"):
        built = None if preset.projector is None else build_projector(preset.projector, 768, 768)
    assert type(built) is (type(None) if projector is None else projector)
    if projector is MLPProjector:
        assert built.config.hidden_dim == 2048
    if projector is ConvProjector:
        assert built.config.kernel_size == 3
        assert all(term.target_transform == SpatialNorm(0.6) for term in terms.values())
        assert build_target_transform(preset.target_transform) == SpatialNorm(0.6)
    else:
        assert all(term.target_transform is None for term in terms.values())


def test_all_presets_are_there_and_the_default_is_ours():
    assert set(METHOD_PRESETS) == set(EXPECTED)
    assert DEFAULT_PRESET == "srepa-mse"


@pytest.mark.parametrize("name", EXPECTED)
def test_plain_values_are_fresh_and_survive_json(name):
    values = alignment_preset(name)
    assert set(values) == {"projector", "target_transform", "terms", "class_token_weight"}
    assert values["class_token_weight"] == EXPECTED[name][-1]
    assert json.loads(json.dumps(values)) == values
    for term in values["terms"].values():
        term["weight"] = 17
        term["objective"]["name"] = "changed"
    assert alignment_preset(name) != values or not values["terms"]
    assert build_terms(alignment_preset(name)["terms"]) == build_terms(METHOD_PRESETS[name].terms)


def test_unknown_presets_are_answered_with_all_names_and_the_closest():
    with pytest.raises(ConfigurationError, match="'srepa_mse' is not one of sit, repa, .*did you mean .*'srepa-mse'"):
        get_preset("srepa_mse")
    with pytest.raises(ConfigurationError, match="'xyz'"):
        alignment_preset("xyz")


@pytest.mark.parametrize(
    ("num_layers", "hidden_size", "depth"),
    [
        (12, 768, 4),
        (24, 1024, 8),
        (28, 1152, 8),
        (28, None, 8),
        (12, 384, 4),
        (28, 64, 9),
        (6, 192, 2),
        (3, 32, 1),
        (2, 32, 1),
        (1, 32, 1),
    ],
)
def test_default_depth(num_layers, hidden_size, depth):
    assert default_depth(num_layers, hidden_size) == depth


def test_no_blocks_no_depth():
    with pytest.raises(ConfigurationError, match="0 blocks"):
        default_depth(0)


def test_the_table_is_read_without_torch():
    code = "import sys, diffusers_srepa.alignment.presets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
