"""Resampling of position tables: bicubic, antialiased, float32, once; other grids on demand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers

from diffusers_srepa.teachers.auto_teacher import Teacher
from diffusers_srepa.teachers.position_table import resample_position_table


def cubic_kernel(distance: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution kernel; antialiased resampling uses a = -0.5."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resample_matrix(old: int, new: int) -> np.ndarray:
    """Row i holds the weights of the old samples in new sample i; the kernel widens when shrinking."""
    scale = old / new
    width = max(scale, 1.0)
    centers = (np.arange(new) + 0.5) * scale
    weights = cubic_kernel((np.arange(old)[None] + 0.5 - centers[:, None]) / width)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("new_grid", [(16, 16), (5, 9), (40, 37), (12, 37)])
def test_resampling_equals_an_independent_convolution(new_grid: tuple[int, int]) -> None:
    table = torch.randn(1, 1 + 37 * 37, 4, generator=torch.Generator().manual_seed(0))
    patches = table[0, 1:].double().numpy().reshape(37, 37, 4)
    expected = np.einsum("ih,jw,hwd->ijd", resample_matrix(37, new_grid[0]), resample_matrix(37, new_grid[1]), patches)
    resampled = resample_position_table(table, (37, 37), new_grid)
    assert resampled.shape == (1, 1 + new_grid[0] * new_grid[1], 4)
    assert torch.equal(resampled[:, :1], table[:, :1])
    np.testing.assert_allclose(resampled[0, 1:].numpy(), expected.reshape(-1, 4), atol=2e-5)


def test_the_same_grid_is_left_alone_and_half_precision_is_resampled_in_float32() -> None:
    table = torch.randn(1, 2 + 16, 4, dtype=torch.bfloat16)
    assert torch.equal(resample_position_table(table, (4, 4), (4, 4)), table.float())
    resampled = resample_position_table(table, (4, 4), (3, 3))
    assert resampled.dtype == torch.float32
    assert torch.equal(resampled, resample_position_table(table.float(), (4, 4), (3, 3)))


def test_the_kernel_differs_from_the_one_inside_dinov2(checkpoint: Callable[[str], str]) -> None:
    own = transformers.Dinov2Model.from_pretrained(checkpoint("dinov2"), dtype=torch.float32)
    inside = own.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 9, 32), 24, 24)
    ours = resample_position_table(own.embeddings.position_embeddings, (4, 4), (3, 3))
    assert (ours - inside).norm() > 0.1 * ours.norm()


def test_registers_tower_agrees_with_its_own_antialiased_interpolation(
    checkpoint: Callable[[str], str], images: torch.Tensor
) -> None:
    own = transformers.Dinov2WithRegistersModel.from_pretrained(
        checkpoint("dinov2_with_registers"), dtype=torch.float32
    ).eval()
    teacher = Teacher.from_pretrained(checkpoint("dinov2_with_registers"), grid=(3, 6))
    wide = images[:, :, :24]
    pixels = torch.nn.functional.interpolate(wide, size=(24, 48), mode="bicubic")
    pixels = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = own(pixels).last_hidden_state[:, 4:]
    torch.testing.assert_close(teacher(wide).patch_tokens, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_the_table_is_written_back_once(kind: str, checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    teacher = Teacher.from_pretrained(checkpoint(kind), grid=(6, 6))
    embeddings = teacher.model.embeddings
    table = embeddings.position_embedding.weight[None] if kind == "clip" else embeddings.position_embeddings
    assert table.shape == (1, 1 + 36, 32) and not table.requires_grad
    before = table.clone()
    teacher(images)
    assert torch.equal(table, before)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "vit_mae", "clip", "siglip", "siglip2"])
def test_a_grid_given_per_call_equals_a_teacher_built_for_it(kind: str, checkpoint: Callable[[str], str]) -> None:
    images = torch.rand(1, 3, 20, 40, generator=torch.Generator().manual_seed(5))
    teacher = Teacher.from_pretrained(checkpoint(kind), grid=(6, 6))
    square = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(6))
    before = teacher(square).patch_tokens
    features = teacher(images, grid=(3, 6))
    expected = Teacher.from_pretrained(checkpoint(kind), grid=(3, 6))(images)
    assert features.grid == (3, 6) and teacher.grid == (6, 6)
    torch.testing.assert_close(features.patch_tokens, expected.patch_tokens, rtol=1e-5, atol=1e-6)
    assert torch.equal(teacher(images, grid=(3, 6)).patch_tokens, features.patch_tokens)
    assert torch.equal(teacher(square).patch_tokens, before)


@pytest.mark.parametrize("duplicated", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))])
def test_a_copy_uses_its_own_table(
    duplicated: Callable[[Teacher], Teacher], checkpoint: Callable[[str], str], images: torch.Tensor
) -> None:
    teacher = Teacher.from_pretrained(checkpoint("dinov2"), grid=(6, 6))
    duplicate = duplicated(teacher)
    before = teacher(images).patch_tokens
    assert torch.equal(duplicate(images).patch_tokens, before)
    duplicate.model.embeddings.position_embeddings.data.zero_()
    assert torch.equal(teacher(images).patch_tokens, before)
    assert not torch.allclose(duplicate(images).patch_tokens, before)


def test_the_grid_defaults_to_the_checkpoints_own(checkpoint: Callable[[str], str]) -> None:
    for kind in ("dinov2", "dinov3_vit", "clip", "siglip2"):
        assert Teacher.from_pretrained(checkpoint(kind)).grid == (4, 4)
