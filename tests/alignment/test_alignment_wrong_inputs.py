"""Wrong arguments of the parts that users put together: one sentence with what was found and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import DistanceMarginAlignment, GramKLAlignment
from diffusers_srepa.alignment.projectors import ConvProjector, LinearProjector, MLPProjector
from diffusers_srepa.alignment.spatial_norm import SpatialNorm
from diffusers_srepa.alignment.term import AlignmentTerm, Tap
from diffusers_srepa.hooks import FeatureTap
from diffusers_srepa.tokens import TeacherFeatures, TokenMap
from tests.helpers.tiny_sit import tiny_sit


BLOCK = "transformer_blocks.0"
KEY = ("default", "default")
SIT = tiny_sit()
WIDTH = SIT.config.num_attention_heads * SIT.config.attention_head_dim
STUDENT = TokenMap(torch.rand(2, 4, 6), (2, 2))
TEACHER = TeacherFeatures(torch.rand(2, 4, 6), (2, 2))


def denoiser(**changes: Any) -> AlignedDenoiser:
    arguments = {"transformer": SIT, "tap": BLOCK, "projector": LinearProjector(WIDTH, 6)} | changes
    return AlignedDenoiser(**arguments)


def run(**changes: Any) -> object:
    return denoiser(**changes)(torch.rand(2, 4, 8, 8), torch.tensor([1.0, 2.0]), class_labels=torch.tensor([0, 1]))


def loss(tokens: Any = None, targets: Any = TEACHER, **arguments: Any) -> object:
    return AlignmentLoss({"cosine": (CosineAlignment(), 1.0)})(
        {KEY: STUDENT} if tokens is None else tokens, targets, **arguments
    )


def term(**changes: Any) -> AlignmentTerm:
    return AlignmentTerm(**({"objective": CosineAlignment()} | changes))


class TwoOutputs(nn.Module):
    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens, tokens


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    # AlignedDenoiser
    "transformer": (lambda: denoiser(transformer="sit"), "transformer of an AlignedDenoiser is a str"),
    "tap, a number": (lambda: denoiser(tap=8), "tap of an AlignedDenoiser is 8, but must be a path"),
    "tap, nothing": (lambda: denoiser(tap=None), "tap of an AlignedDenoiser is None"),
    "tap, a list": (lambda: denoiser(tap=[BLOCK]), "must be a path .* or a dict"),
    "tap, a number in a dict": (lambda: denoiser(tap={"early": 4}), r"is \{'early': 4\}, but must be a path"),
    "tap, another model's": (lambda: denoiser(tap="blocks.7"), "no 'blocks': did you mean 'transformer_blocks'"),
    "tap, too deep": (lambda: denoiser(tap="transformer_blocks.9"), "has the entries 0 to"),
    "tap, no text": (lambda: FeatureTap(SIT, 3), "tap is 3, but must be a path"),
    "projector, a class": (lambda: denoiser(projector=MLPProjector), "projector of an AlignedDenoiser is a type"),
    "projector, a name": (lambda: denoiser(projector="mlp"), "is a str, but must be a module such as MLPProjector"),
    "projector, a list": (lambda: denoiser(projector=[LinearProjector(WIDTH, 6)]), "is a list, but must be a module"),
    "projector, a name in a dict": (lambda: denoiser(projector={"a": "mlp"}), "cannot be registered"),
    "projector, of another width": (
        lambda: run(projector=MLPProjector(5, 6)),
        rf"MLPProjector was built for tokens of width 5, but got .*set its in_dim to {WIDTH}",
    ),
    "projector, a convolution of another width": (
        lambda: run(projector=ConvProjector(5, 6)),
        "built for tokens of wi",
    ),
    "projector, with two outputs": (lambda: run(projector=TwoOutputs()), "'default' returns a tuple for tokens"),
    "projector, that drops tokens": (lambda: run(projector=nn.Flatten()), r"returns shape \(2, \d+\) for tokens"),
    "features, a name": (lambda: denoiser(features="default"), "features of an AlignedDenoiser are 'default'"),
    "features, names": (lambda: denoiser(features=["default"]), r"must be a list of \(tap, projector\) pairs"),
    "features, one pair": (lambda: denoiser(features=KEY), r"must be a list of \(tap, projector\) pairs"),
    "features, an unknown name": (lambda: denoiser(features=[("x", "default")]), "names an unknown tap"),
    "grid, a number": (lambda: denoiser(grid=4), "grid of an AlignedDenoiser is 4, but must be two positive"),
    "grid, one number": (lambda: denoiser(grid=(4,)), "must be two positive whole numbers"),
    "grid, text": (lambda: denoiser(grid="44"), "must be two positive whole numbers"),
    "grid, zero": (lambda: denoiser(grid=(0, 4)), "must be two positive whole numbers"),
    "grid, another": (lambda: run(grid=(3, 3)), "returns 16 tokens, .* but the grid is 3 x 3: set grid"),
    "prefix tokens, negative": (lambda: denoiser(num_prefix_tokens=-1), "num_prefix_tokens of .* is -1"),
    "prefix tokens, text": (lambda: denoiser(num_prefix_tokens="1"), "num_prefix_tokens of .* is '1'"),
    "prefix tokens, another": (lambda: run(num_prefix_tokens=2), "of which 2 are prefix tokens"),
    # AlignmentLoss and its terms
    "terms, nothing": (lambda: AlignmentLoss(None), "terms of an AlignmentLoss are None, but must be a dict"),
    "terms, a list": (lambda: AlignmentLoss([CosineAlignment()]), "must be a dict"),
    "terms, an objective": (lambda: AlignmentLoss({"c": CosineAlignment()}), "AlignmentTerm or a pair"),
    "terms, a name": (lambda: AlignmentLoss({"c": ("cosine", 1.0)}), "is 'cosine', but must be an AlignmentObjective"),
    "terms, turned round": (lambda: AlignmentLoss({"c": (1.0, CosineAlignment())}), "objective .* is 1.0, but must"),
    "weight, text": (lambda: term(weight="1"), "is '1', but must be a finite number of at least 0"),
    "weight, negative": (lambda: term(weight=-0.5), "is -0.5, but must be a finite number of at least 0"),
    "term, a tap's depth": (lambda: term(tap=8), "tap of an alignment term is 8, but must be a name"),
    "term, a teacher": (lambda: term(target=TEACHER), "target of an alignment term is .* name or a Tap or None"),
    "term, a projector": (lambda: term(projector=LinearProjector(2, 2)), "projector of an alignment term is"),
    "term, a transform's name": (
        lambda: term(target_transform="spatial_norm"),
        "is 'spatial_norm', but must be a fun",
    ),
    "term, a transform's class": (lambda: term(target_transform=SpatialNorm), "must be a function of a TokenMap"),
    "term, an objective to transform": (lambda: term(target_transform=CosineAlignment()), "must be a function"),
    "term, a transform to tensors": (
        lambda: AlignmentLoss({"c": term(target_transform=lambda target: target.tokens)})({KEY: STUDENT}, TEACHER),
        "returns a Tensor, but must return a TokenMap",
    ),
    "tap, a number as its name": (lambda: Tap(3), "name of a Tap is 3"),
    "tap, text for detach": (lambda: Tap("late", detach="no"), "detach of a Tap is 'no'"),
    "call, no tokens": (lambda: loss(tokens=()), "student's tokens are a tuple, but must be the dict"),
    "call, the tokens alone": (lambda: loss(tokens=STUDENT), "student's tokens are a TokenMap, but must be the dict"),
    "call, tensors": (lambda: loss(tokens={KEY: STUDENT.tokens}), "tokens are a dict of Tensor, but must be"),
    "call, everything that the student returns": (lambda: loss(tokens=(0, {KEY: STUDENT})), "second output"),
    "call, turned round": (lambda: loss(tokens=TEACHER, targets={KEY: STUDENT}), "tokens are a TeacherFeatures"),
    "call, a teacher's tensor": (lambda: loss(targets=TEACHER.patch_tokens), "targets are a Tensor, but must be what"),
    "call, a teacher's tokens": (lambda: loss(targets=TEACHER.token_map()), "targets are a TokenMap"),
    "call, a dict of tensors": (lambda: loss(targets={"default": TEACHER.patch_tokens}), "targets are a dict of Ten"),
    "call, no teacher": (lambda: loss(targets=None), "no teacher's features were passed"),
    "call, no step": (lambda: loss(step=None), "step is None, but must be the number of optimiser steps"),
    "call, text for a step": (lambda: loss(step="3"), "step is '3'"),
    "call, a negative step": (lambda: loss(step=-1), "step is -1"),
    # Objectives, projectors and the spatial norm alone
    "objective, tensors": (lambda: CosineAlignment()(STUDENT.tokens, STUDENT.tokens), "the student is a Tensor: wrap"),
    "objective, features": (
        lambda: CosineAlignment()(STUDENT, TEACHER),
        "the target is a TeacherFeatures: .*token_map",
    ),
    "objective, text for a flag": (lambda: CosineAlignment(include_prefix_tokens="no"), "'no', but must be true or f"),
    "objective, text for a flag of another": (
        lambda: GramKLAlignment(include_prefix_tokens=1),
        "include_prefix_tokens of GramKLAlignment is 1",
    ),
    "temperature, text": (lambda: GramKLAlignment("a"), "tau_teacher of GramKLAlignment is 'a'"),
    "temperature, true": (lambda: GramKLAlignment(0.2, True), "tau_student of GramKLAlignment is True"),
    "temperature, infinite": (lambda: GramKLAlignment(float("inf")), "is inf, but must be a finite number above 0"),
    "margin, nothing": (lambda: DistanceMarginAlignment(None), "margin of DistanceMarginAlignment is None"),
    "margin, not a number": (lambda: DistanceMarginAlignment(float("nan")), "is nan, but must be a finite number of"),
    "alpha, text": (lambda: SpatialNorm("a"), "alpha of the spatial norm is 'a'"),
    "alpha, nothing": (lambda: SpatialNorm(None), "alpha of the spatial norm is None"),
    "spatial norm, a tensor": (lambda: SpatialNorm()(STUDENT.tokens), "takes a TokenMap, but got a Tensor"),
    "linear, of another width": (lambda: LinearProjector(5, 3)(STUDENT), "width 5, but got tokens of shape"),
    "linear, a tensor of another width": (lambda: LinearProjector(5, 3)(STUDENT.tokens), "set its in_dim to 6"),
    "linear, a list": (lambda: LinearProjector(5, 3)([1]), "takes a TokenMap or a tensor .* but got a list"),
    "convolution, plain tokens": (lambda: ConvProjector(6, 3)(STUDENT.tokens), "needs the token grid"),
    "convolution, an even kernel": (lambda: ConvProjector(6, 3, 2), "kernel_size is 2, but must be odd"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_sentence_for(name: str) -> None:
    build, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        build()
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text


def test_the_right_arguments_pass() -> None:
    run(grid=[4, 4], num_prefix_tokens=0, features=iter([list(KEY)]), tap={"default": BLOCK})
    loss(step=2.5)
