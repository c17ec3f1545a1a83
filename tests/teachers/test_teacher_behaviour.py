"""A teacher is frozen, answers in float32 and survives moving, casting, copying and compiling."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from diffusers_srepa.teachers.auto_teacher import Teacher
from diffusers_srepa.teachers.families import TABLE


def test_it_is_frozen_and_in_evaluation_mode_for_ever(checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    teacher = Teacher.from_pretrained(checkpoint("dinov3_vit"))
    before = teacher(images).patch_tokens
    holder = torch.nn.ModuleDict({"teacher": teacher}).train()
    assert holder.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.train() is teacher and torch.equal(teacher(images).patch_tokens, before)


def test_features_carry_no_graph_and_can_be_saved_for_backward(
    checkpoint: Callable[[str], str], images: torch.Tensor
) -> None:
    teacher = Teacher.from_pretrained(checkpoint("dinov2"))
    with torch.inference_mode():
        features = teacher(images)
    student = torch.zeros_like(features.patch_tokens, requires_grad=True)
    torch.nn.functional.mse_loss(student, features.patch_tokens).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert not features.patch_tokens.requires_grad and not features.patch_tokens.is_inference()
    assert not teacher(images.clone().requires_grad_()).patch_tokens.requires_grad


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "vit_mae", "clip", "siglip", "siglip2"])
def test_bfloat16_weights_answer_in_float32(kind: str, checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    exact = Teacher.from_pretrained(checkpoint(kind), grid=(6, 6))
    half = Teacher.from_pretrained(checkpoint(kind), grid=(6, 6), dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and exact.dtype == torch.float32
    features = half(images)
    assert features.patch_tokens.dtype == torch.float32
    similarity = torch.cosine_similarity(features.patch_tokens, exact(images).patch_tokens, dim=-1)
    assert similarity.mean() > 0.98
    wide = images[:, :, :24]
    assert half(wide, grid=(3, 6)).patch_tokens.dtype == torch.float32


def test_casting_afterwards_equals_loading_in_that_dtype(
    checkpoint: Callable[[str], str], images: torch.Tensor
) -> None:
    loaded = Teacher.from_pretrained(checkpoint("dinov3_vit"), dtype=torch.bfloat16)
    cast = Teacher.from_pretrained(checkpoint("dinov3_vit")).to(torch.bfloat16)
    frequencies = cast.model.rope_embeddings.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, loaded.model.rope_embeddings.inv_freq)
    assert torch.equal(cast(images).patch_tokens, loaded(images).patch_tokens)


def test_half_precision_does_not_round_the_normalisation(checkpoint: Callable[[str], str]) -> None:
    teacher = Teacher.from_pretrained(checkpoint("dinov2"), dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    teacher.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    image = torch.full((1, 3, 32, 32), 0.7)
    teacher(image)
    expected = torch.tensor([(0.7 - 0.4) / 0.2, (0.7 - 0.5) / 0.3, (0.7 - 0.6) / 0.4]).to(torch.bfloat16)
    assert torch.equal(seen[0][0, :, 0, 0], expected)


@pytest.mark.parametrize("dtype", ["int8", "float3", torch.int64, 16])
def test_a_dtype_that_is_not_floating_point_is_refused(dtype: object, checkpoint: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="`dtype` must be a floating-point dtype"):
        Teacher.from_pretrained(checkpoint("dinov2"), dtype=dtype)


def test_it_works_under_the_callers_autocast(checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    for kind in ("dinov2", "vit_mae", "siglip2"):
        teacher = Teacher.from_pretrained(checkpoint(kind), grid=(6, 6))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = teacher(images)
        assert features.patch_tokens.dtype == torch.float32
        similarity = torch.cosine_similarity(features.patch_tokens, teacher(images).patch_tokens, dim=-1)
        assert similarity.mean() > 0.98


def test_a_deep_copy_taps_its_own_block(checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    teacher = Teacher.from_pretrained(checkpoint("clip"))
    duplicate = copy.deepcopy(teacher)
    for parameter in duplicate.parameters():
        parameter.data.mul_(0.5)
    first = teacher(images).patch_tokens
    second = duplicate(images).patch_tokens
    assert not torch.allclose(first, second)
    assert torch.equal(teacher(images).patch_tokens, first)
    assert duplicate.tap is not teacher.tap


def test_nothing_of_the_last_batch_is_kept(checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    teacher = Teacher.from_pretrained(checkpoint("vit_mae"))
    teacher(images)
    assert teacher.tap is not None and teacher.tap._feature is None


def test_the_state_dict_restores_the_features(checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    teacher = Teacher.from_pretrained(checkpoint("dinov2"), grid=(6, 6))
    other = Teacher.from_pretrained(checkpoint("dinov2"), grid=(6, 6))
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(teacher.state_dict())
    assert torch.equal(other(images).patch_tokens, teacher(images).patch_tokens)


def test_a_tower_built_by_hand_can_be_given(images: torch.Tensor, checkpoint: Callable[[str], str]) -> None:
    from transformers import Dinov2Model

    tower = Dinov2Model.from_pretrained(checkpoint("dinov2"), dtype=torch.float32)
    teacher = Teacher(tower, TABLE["dinov2"], (6, 6), image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    expected = Teacher.from_pretrained(checkpoint("dinov2"), grid=(6, 6))
    assert torch.equal(teacher(images).patch_tokens, expected(images).patch_tokens)
    assert "grid=(6, 6)" in repr(teacher)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_it_compiles(kind: str, checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    teacher = Teacher.from_pretrained(checkpoint(kind), grid=(6, 6))
    expected = teacher(images)
    compiled = torch.compile(teacher, backend="aot_eager", fullgraph=True)
    features = compiled(images)
    torch.testing.assert_close(features.patch_tokens, expected.patch_tokens)
    torch.testing.assert_close(features.class_token, expected.class_token)
