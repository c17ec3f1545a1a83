"""From the literals of a configuration file to objects, and one sentence for each wrong literal."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

from diffusers_srepa.alignment import objectives
from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramKLAlignment, GramMSEAlignment
from diffusers_srepa.alignment.projectors import ConvProjector, LinearProjector, MLPProjector
from diffusers_srepa.alignment.registry import (
    OBJECTIVES,
    PROJECTORS,
    build_objective,
    build_projector,
    build_target_transform,
    build_terms,
    load_projector,
)
from diffusers_srepa.alignment.schedule import Constant, HardStop, Product, WarmUp
from diffusers_srepa.alignment.spatial_norm import SpatialNorm
from diffusers_srepa.alignment.term import AlignmentTerm, Tap
from diffusers_srepa.errors import ConfigurationError


def test_objectives():
    assert build_objective("cosine") == CosineAlignment()
    assert build_objective({"name": "gram_mse"}) == GramMSEAlignment()
    literal = {"name": "gram_kl", "tau_teacher": 0.1, "reduction": "batchmean", "include_prefix_tokens": False}
    assert build_objective(literal) == GramKLAlignment(0.1, 0.2, "batchmean", include_prefix_tokens=False)
    assert literal["name"] == "gram_kl"
    objective = CosineAlignment()
    assert build_objective(objective) is objective


def test_every_objective_of_the_package_is_registered():
    found = set()
    for module_info in pkgutil.iter_modules(objectives.__path__):
        module = importlib.import_module(f"{objectives.__name__}.{module_info.name}")
        found |= {value for value in vars(module).values() if isinstance(value, type)}
    concrete = {cls for cls in found if issubclass(cls, AlignmentObjective) and not inspect.isabstract(cls)}
    assert concrete == set(OBJECTIVES.values()) and len(OBJECTIVES) == len(concrete)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_registered_objective_builds_by_its_name_alone(name):
    assert type(build_objective(name)) is OBJECTIVES[name]


def test_projectors():
    mlp = build_projector({"name": "mlp", "hidden_dim": 8}, 6, 5)
    assert (
        isinstance(mlp, MLPProjector)
        and dict(mlp.config)["hidden_dim"] == 8
        and mlp(torch.zeros(1, 2, 6)).shape[2] == 5
    )
    conv = build_projector({"name": "conv", "kernel_size": 1}, 6, 5)
    assert isinstance(conv, ConvProjector) and conv.conv.kernel_size == (1, 1)
    assert isinstance(build_projector("linear", 6, 5), LinearProjector)
    own = nn.Identity()
    assert build_projector(own, 6, 5) is own


@pytest.mark.parametrize("name", PROJECTORS)
def test_saved_projectors_load_by_the_class_that_their_configuration_names(name, tmp_path):
    projector = build_projector(name, 6, 5)
    projector.save_pretrained(tmp_path)
    loaded = load_projector(tmp_path)
    assert type(loaded) is type(projector)
    assert all(torch.equal(a, b) for a, b in zip(projector.parameters(), loaded.parameters(), strict=True))


def test_folders_without_a_known_projector(tmp_path):
    with pytest.raises(ConfigurationError, match="no projector in"):
        load_projector(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "MLPProjektor"}')
    with pytest.raises(ConfigurationError, match="'MLPProjektor': did you mean 'MLPProjector'"):
        load_projector(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="no valid JSON"):
        load_projector(tmp_path)


def test_target_transforms():
    assert build_target_transform(None) is None
    assert build_target_transform("spatial_norm") == SpatialNorm(0.6)
    assert build_target_transform({"name": "spatial_norm", "alpha": 0.8}) == SpatialNorm(0.8)


def test_terms_in_full_and_in_short():
    terms = build_terms(
        {
            "cosine": 0.5,
            "gram_mse": {"weight": [{"name": "warm_up", "num_steps": 10}, 2.0]},
            "late": {
                "objective": {"name": "gram_kl", "tau_student": 0.4},
                "weight": {"name": "hard_stop", "step": 100},
                "tap": "deep",
                "target": "clip",
                "projector": None,
                "target_transform": {"name": "spatial_norm"},
                "resample": "area",
            },
            "across": {"objective": "cosine", "tap": "early", "projector": None, "target": {"tap": "deep"}},
            "own": AlignmentTerm(CosineAlignment()),
        },
        target_transform={"name": "spatial_norm", "alpha": 0.1},
    )
    assert terms["cosine"] == AlignmentTerm(CosineAlignment(), Constant(0.5), target_transform=SpatialNorm(0.1))
    assert terms["gram_mse"].weight == Product((WarmUp(10), Constant(2.0)))
    assert terms["late"] == AlignmentTerm(
        GramKLAlignment(tau_student=0.4), HardStop(100), "deep", "clip", None, SpatialNorm(0.6), "area"
    )
    assert terms["across"].target == Tap("deep") and terms["across"].target_transform is None
    assert terms["own"].target_transform == SpatialNorm(0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_objective("gram_msee"), "objective 'gram_msee' is unknown: did you mean 'gram_mse'"),
        (lambda: build_objective({"name": ["a"]}), "is unknown"),
        (lambda: build_objective({"tau": 1}), "has no name"),
        (lambda: build_objective({"name": "gram_kl", "tau_techer": 1}), "no argument 'tau_techer': .*'tau_teacher'"),
        (
            lambda: build_objective({"name": "gram_kl", "tau_teacher": 0}),
            "tau_teacher of GramKLAlignment is 0, but must .* above 0",
        ),
        (
            lambda: build_objective({"name": "gram_kl", "tau_student": "0.2"}),
            "tau_student of GramKLAlignment is '0.2'",
        ),
        (lambda: build_objective({"name": "gram_mse", "form": "fast"}), "'gram_mse' cannot be built: .*'feature'"),
        (lambda: build_objective({"name": "dispersive", "tau": [1]}), r"tau of DispersiveAlignment is \[1\]"),
        (lambda: build_objective({"name": "distance_margin", "margin": None}), "margin of Dist.* of at least 0"),
        (lambda: build_objective({"name": "cosine", "include_prefix_tokens": "no"}), "must be true or false"),
        (lambda: build_objective(3), "objective is 3, but must be one of cosine, .* or an object of the class"),
        (lambda: build_objective(CosineAlignment), "objective is <class .*object of the class AlignmentObjective"),
        (lambda: build_projector("mpl", 6, 5), "did you mean 'mlp'"),
        (lambda: build_projector({"name": "mlp", "hidden": 8}, 6, 5), "did you mean 'hidden_dim'"),
        (lambda: build_projector({"name": "mlp", "hidden_dim": "8"}, 6, 5), "hidden_dim is '8'"),
        (
            lambda: build_projector({"name": "linear", "bias": True}, 6, 5),
            "'linear' has no argument 'bias': it takes none",
        ),
        (lambda: build_projector({"name": "mlp", "in_dim": 8}, 6, 5), "'mlp' sets 'in_dim', which follows from"),
        (lambda: build_projector(None, 6, 5), "projector is None, but must be one of mlp, linear, conv"),
        (lambda: build_projector(MLPProjector, 6, 5), "object of the class Module"),
        (lambda: build_target_transform({"name": "spatial_norm", "alpha": "x"}), "alpha of the spatial norm is 'x'"),
        (lambda: build_target_transform("spatialnorm"), "did you mean 'spatial_norm'"),
        (lambda: build_target_transform(["spatial_norm"]), "must be one of spatial_norm, a mapping"),
        (lambda: build_target_transform(SpatialNorm), "must be one of spatial_norm, a mapping"),
        (lambda: build_terms([("cosine", 1.0)]), r"terms are \[.*must be a mapping"),
        (lambda: build_terms(None), "terms are None, but must be a mapping"),
        (lambda: build_terms({3: 1.0}), "term 3 has no name"),
        (lambda: build_terms({"cosine": "1e-3"}), "weight '1e-3' is text: write the number .* 1.0e-3"),
        (lambda: build_terms({"cosine": {"weight": "hard_stop"}}), "'hard_stop' needs the argument 'step'"),
        (lambda: build_terms({"cosine": {"weight": {"name": "product", "factors": 3}}}), "must be a list"),
        (lambda: build_terms({"cosine": {"objective": None}}), "objective is None"),
        (lambda: build_terms({"cosine": {"tap": 8}}), "tap of an alignment term is 8, but must be a name"),
        (lambda: build_terms({"cosine": {"projector": 1}}), "projector of an alignment term is 1, .* name or None"),
        (lambda: build_terms({"cosine": {"target": ["a"]}}), r"target of an alignment term is \['a'\], .* or a Tap"),
        (lambda: build_terms({"cosine": {"resample": "nearest"}}), "resample is 'nearest', but must be 'area'"),
        (
            lambda: build_terms({"layer_sync": {"target": {"tap": "a", "detach": "false"}}}),
            "detach of a Tap is 'false'",
        ),
        (lambda: build_terms({"layer_sync": {"target": {"tap": 3}}}), "name of a Tap is 3"),
        (lambda: build_terms({"cosin": 1.0}), "did you mean 'cosine'"),
        (
            lambda: build_terms({"cosine": {"wieght": 1.0}}),
            "term 'cosine' has no argument 'wieght': did you mean 'weight'",
        ),
        (lambda: build_terms({"cosine": None}), "None"),
        (lambda: build_terms({"cosine": -1}), "-1"),
        (lambda: build_terms({"cosine": {"target": {"name": "deep"}}}), "must have the key tap"),
    ],
)
def test_wrong_literals_are_answered_in_one_sentence(build, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        build()
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
