"""Objectives, projectors, schedules and terms from the plain literals of a configuration file.

A literal is a name, or a mapping with the key `name` and the arguments of the class. An object instead of a literal
passes through, so third parties need no registration. All functions raise a `ConfigurationError` for an unknown name
or argument, close ones given, and for a value that the class refuses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.objectives.batch import (
    BatchCKAAlignment,
    DispersiveAlignment,
    SimilarityPreservingAlignment,
)
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment, LayerSyncAlignment
from diffusers_srepa.alignment.objectives.relational import (
    CKAAlignment,
    DistanceMarginAlignment,
    GramKLAlignment,
    GramMSEAlignment,
    PositiveGramAlignment,
    RKDDistanceAlignment,
)
from diffusers_srepa.alignment.projectors import ConvProjector, LinearProjector, MLPProjector, saved_class_name
from diffusers_srepa.alignment.schedule import (
    Constant,
    CosineDecay,
    HardStop,
    LinearDecay,
    Product,
    Schedule,
    WarmUp,
    as_schedule,
)
from diffusers_srepa.alignment.spatial_norm import SpatialNorm
from diffusers_srepa.alignment.term import AlignmentTerm, Tap, describe_value
from diffusers_srepa.errors import ConfigurationError, close_matches, one_line
from diffusers_srepa.tokens import TokenMap


TokenTransform = Callable[[TokenMap], TokenMap]

OBJECTIVES: dict[str, type[AlignmentObjective]] = {
    "cosine": CosineAlignment,
    "gram_mse": GramMSEAlignment,
    "gram_kl": GramKLAlignment,
    "positive_gram": PositiveGramAlignment,
    "distance_margin": DistanceMarginAlignment,
    "rkd_distance": RKDDistanceAlignment,
    "cka": CKAAlignment,
    "batch_cka": BatchCKAAlignment,
    "similarity_preserving": SimilarityPreservingAlignment,
    "dispersive": DispersiveAlignment,
    "layer_sync": LayerSyncAlignment,
}

PROJECTORS: dict[str, type[nn.Module]] = {
    "mlp": MLPProjector,
    "linear": LinearProjector,
    "conv": ConvProjector,
}

TARGET_TRANSFORMS: dict[str, type] = {"spatial_norm": SpatialNorm}

SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear_decay": LinearDecay,
    "cosine_decay": CosineDecay,
    "hard_stop": HardStop,
    "warm_up": WarmUp,
    "product": Product,
}


def build_objective(literal: str | Mapping[str, Any] | AlignmentObjective) -> AlignmentObjective:
    """An objective, for instance of `"cosine"` or `{"name": "gram_kl", "tau_teacher": 0.2}`."""
    return _build("objective", literal, OBJECTIVES, AlignmentObjective)


def build_projector(literal: str | Mapping[str, Any] | nn.Module, in_dim: int, out_dim: int) -> nn.Module:
    """A projector from `in_dim` to `out_dim` wide tokens, of `"mlp"` or `{"name": "conv", "kernel_size": 1}`."""
    return _build("projector", literal, PROJECTORS, nn.Module, in_dim=in_dim, out_dim=out_dim)


def load_projector(folder: str | Path) -> nn.Module:
    """The projector saved in `folder`, of the registered class that its configuration names."""
    known = {projector.__name__: projector for projector in PROJECTORS.values()}
    class_name = saved_class_name(Path(folder))
    if class_name is None:
        raise ConfigurationError(f"there is no projector in {folder}: give a folder that save_pretrained wrote.")
    if class_name not in known:
        raise ConfigurationError(
            f"{folder} holds a projector of the unknown class {class_name!r}: {_hint(class_name, known)}."
        )
    return known[class_name].from_pretrained(folder)  # type: ignore[attr-defined]


def build_schedule(literal: float | str | Mapping[str, Any] | Sequence[Any] | Schedule) -> Schedule:
    """A weight schedule: a number, a literal such as `{"name": "hard_stop", "step": 250000}`, or a list of factors."""
    if isinstance(literal, Mapping) and literal.get("name") == "product":
        _check_keys("schedule 'product'", {key: literal[key] for key in literal if key != "name"}, Product)
        literal = literal["factors"]
        if isinstance(literal, str) or not isinstance(literal, Sequence):
            raise ConfigurationError(f"the factors of the schedule 'product' are {literal!r}, but must be a list.")
    if isinstance(literal, Sequence) and not isinstance(literal, str):
        return Product(tuple(build_schedule(factor) for factor in literal))
    if isinstance(literal, str) and _is_number(literal):
        # YAML reads 1e-3 as text; 1.0e-3 is a number there.
        raise ConfigurationError(
            f"the weight {literal!r} is text: write the number without quotes and with a point, as in 0.5 or 1.0e-3."
        )
    if isinstance(literal, str | Mapping):
        return _build("schedule", literal, SCHEDULES, Schedule)
    return as_schedule(literal)


def build_target_transform(literal: str | Mapping[str, Any] | TokenTransform | None) -> TokenTransform | None:
    """What is done to the target's tokens first, for instance `{"name": "spatial_norm", "alpha": 0.6}`, or None."""
    if literal is None or (callable(literal) and not isinstance(literal, type)):
        return literal
    return _build("target_transform", literal, TARGET_TRANSFORMS, None)


def build_terms(
    literals: Mapping[str, Any], target_transform: str | Mapping[str, Any] | TokenTransform | None = None
) -> dict[str, AlignmentTerm]:
    """Alignment terms by name.

    Args:
        literals (`Mapping`): by name an `AlignmentTerm`, a mapping of its arguments with literals as values, or its
            weight alone as a number. Where the objective is left out, the term's name is the objective's. A target
            that is another tap is written `{"tap": name, "detach": true, "projector": null}`.
        target_transform (*optional*): for the terms that have none of their own and a teacher as target.
    """
    if not isinstance(literals, Mapping):
        raise ConfigurationError(
            f"the alignment terms are {describe_value(literals)}, but must be a mapping such as "
            "{cosine: 1.0} of names to terms."
        )
    terms = {}
    for name, literal in literals.items():
        terms[name] = _build_term(name, literal)
        if terms[name].target_transform is None and terms[name].teacher is not None:
            terms[name].target_transform = build_target_transform(target_transform)
    return terms


def _build_term(name: str, literal: Any) -> AlignmentTerm:
    if isinstance(literal, AlignmentTerm):
        return literal
    if not isinstance(name, str):
        raise ConfigurationError(f"the alignment term {name!r} has no name: the keys of the terms must be text.")
    if not isinstance(literal, Mapping):
        literal = {"weight": literal}
    arguments: dict[str, Any] = {"objective": name, **literal}
    _check_keys(f"alignment term {name!r}", arguments, AlignmentTerm)
    arguments["objective"] = build_objective(arguments["objective"])
    if "weight" in arguments:
        arguments["weight"] = build_schedule(arguments["weight"])
    if "target_transform" in arguments:
        arguments["target_transform"] = build_target_transform(arguments["target_transform"])
    if isinstance(arguments.get("target"), Mapping):
        arguments["target"] = _build_tap(name, arguments["target"])
    return AlignmentTerm(**arguments)


def _build_tap(name: str, literal: Mapping[str, Any]) -> Tap:
    if set(literal) - {"tap", "detach", "projector"} or "tap" not in literal:
        raise ConfigurationError(
            f"the target of the alignment term {name!r} is {dict(literal)}, but must have the key tap and may have "
            "detach and projector."
        )
    return Tap(literal["tap"], literal.get("detach", True), literal.get("projector"))


def _build(kind: str, literal: Any, registry: Mapping[str, type], wanted: type | None, **given: Any) -> Any:
    """The object that `literal` describes, or `literal` itself if it is a `wanted` (None: a function of tokens)."""
    if wanted is not None and isinstance(literal, wanted):
        return literal
    if not isinstance(literal, str | Mapping):
        other = "a function of a TokenMap" if wanted is None else f"an object of the class {wanted.__name__}"
        raise ConfigurationError(
            f"the {kind} is {describe_value(literal)}, but must be one of {', '.join(registry)}, a mapping with the "
            f"key name, or {other}."
        )
    arguments = {"name": literal} if isinstance(literal, str) else dict(literal)
    if "name" not in arguments:
        raise ConfigurationError(
            f"the {kind} {arguments} has no name: give it the key name, one of {', '.join(registry)}."
        )
    name = arguments["name"]
    if not isinstance(name, str) or name not in registry:
        raise ConfigurationError(f"the {kind} {name!r} is unknown: {_hint(str(name), registry)}.")
    arguments.pop("name")
    for key in given:
        if key in arguments:
            raise ConfigurationError(
                f"the {kind} {name!r} sets {key!r}, which follows from the student and its teacher: leave it out."
            )
    _check_keys(f"{kind} {name!r}", arguments | given, registry[name], given=given)
    try:
        return registry[name](**arguments, **given)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"the {kind} {name!r} cannot be built: {one_line(error)}.") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_keys(kind: str, literal: Mapping[str, Any], target: type, given: Mapping[str, Any] | None = None) -> None:
    """Refuse keys that are no argument of `target`, and arguments without default that are missing."""
    parameters = inspect.signature(target).parameters
    open_names = [name for name in parameters if name not in (given or {})]
    for key in literal:
        if key not in parameters:
            hint = _hint(str(key), open_names) if open_names else "it takes none"
            raise ConfigurationError(f"the {kind} has no argument {key!r}: {hint}.")
    for name in open_names:
        if parameters[name].default is inspect.Parameter.empty and name not in literal:
            raise ConfigurationError(f"the {kind} needs the argument {name!r}: add it.")


def _hint(name: str, known: Any) -> str:
    return close_matches(name, known).rstrip("?")
