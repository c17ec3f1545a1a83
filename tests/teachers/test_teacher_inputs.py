"""What a teacher accepts, and the sentence for what it does not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_srepa.teachers.auto_teacher import Teacher
from diffusers_srepa.teachers.preprocessing import check_range, normalize_images, resize_images


@pytest.fixture
def teacher(checkpoint: Callable[[str], str]) -> Teacher:
    return Teacher.from_pretrained(checkpoint("dinov2"))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"float in \[0, 1\], but have dtype torch.uint8"),
        (torch.zeros(3, 32, 32), r"shape \(B, 3, H, W\), but have shape \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"shape \(B, 3, H, W\), but have shape \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 48), "32 x 48 pixels have another aspect ratio than the teacher's grid of 4 x 4"),
        (torch.full((1, 3, 32, 32), -1.0), r"must lie in \[0, 1\], but range from -1 to -1"),
        (torch.full((1, 3, 32, 32), 255.0), r"must lie in \[0, 1\], but range from 255 to 255"),
        (torch.full((1, 3, 32, 32), float("nan")), r"must lie in \[0, 1\], but range from nan"),
        ([1, 2], "takes a float tensor of images .* but got list"),
    ],
)
def test_wrong_images_get_one_sentence(teacher: Teacher, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        teacher(images)
    assert "\n" not in str(caught.value)


def test_rounding_of_half_precision_images_is_tolerated(teacher: Teacher) -> None:
    images = torch.rand(1, 3, 32, 32).to(torch.bfloat16)
    assert teacher(images).patch_tokens.dtype == torch.float32
    check_range(torch.tensor([-0.005, 1.005]))
    check_range(torch.empty(0, 3, 32, 32))


@pytest.mark.parametrize("grid", [(0, 4), (4, -1), (4,), (4, 4, 4), 4, "44", (4.0, 4.0), (True, 4)])
def test_a_grid_that_is_not_two_positive_integers_is_refused(grid: Any, checkpoint: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="teacher's `grid` is .* must be two positive whole numbers"):
        Teacher.from_pretrained(checkpoint("dinov2"), grid=grid)


def test_a_grid_may_come_as_a_list(checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    assert Teacher.from_pretrained(checkpoint("dinov2"), grid=[6, 6])(images).grid == (6, 6)


def test_resize_is_bicubic_without_antialiasing_or_clamping() -> None:
    images = torch.zeros(1, 3, 4, 4)
    images[..., 2:] = 1.0
    resized = resize_images(images, (4, 8))
    # Keys' kernel with a = -0.75 at offsets of a quarter, edges repeated: an overshoot on both sides of the step.
    row = resized[0, 0, 0]
    assert row.min() < -0.01 and row.max() > 1.01
    weights = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]  # taps at distances 1.25, 0.25, 0.75, 1.75
    torch.testing.assert_close(row[3], torch.tensor(weights[2] + weights[3]), atol=1e-6, rtol=0)
    assert resize_images(images, (4, 4)) is images


def test_normalisation_is_per_channel() -> None:
    image = torch.tensor([0.2, 0.4, 0.9]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    normalized = normalize_images(image, (0.1, 0.2, 0.5), (0.1, 0.4, 0.2))
    torch.testing.assert_close(normalized[1, :, 1, 1], torch.tensor([1.0, 0.5, 2.0]))


def with_processor(folder: str, target: Path, content: dict[str, Any] | None) -> str:
    shutil.copytree(folder, target)
    (target / "preprocessor_config.json").unlink()
    if content is not None:
        (target / "preprocessor_config.json").write_text(json.dumps(content))
    return str(target)


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("dinov2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ("siglip", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("siglip2", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_without_a_processor_the_rows_statistics_are_used_and_logged(
    kind: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    checkpoint: Callable[[str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = with_processor(checkpoint(kind), tmp_path / "bare", None)
    with caplog.at_level(logging.WARNING):
        teacher = Teacher.from_pretrained(folder)
    assert (teacher.image_mean, teacher.image_std) == (mean, std)
    lines = [record.message for record in caplog.records if record.name.startswith("diffusers_srepa")]
    assert len(lines) == 1 and "no image processor" in lines[0] and str(mean) in lines[0]


@pytest.mark.parametrize(
    ("content", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
        ({"image_mean": 0.5, "image_std": 0.25}, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        ({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ({"do_rescale": False, "image_mean": [51.0] * 3, "image_std": [25.5] * 3}, (0.2,) * 3, (0.1,) * 3),
        ({"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, (0.5,) * 3, (0.5,) * 3),
        ({}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_the_processor_file_decides_the_normalisation(
    content: dict[str, Any],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    checkpoint: Callable[[str], str],
    tmp_path: Path,
) -> None:
    teacher = Teacher.from_pretrained(with_processor(checkpoint("dinov2"), tmp_path / "own", content))
    assert teacher.image_mean == pytest.approx(mean)
    assert teacher.image_std == pytest.approx(std)


@pytest.mark.parametrize("content", [{"image_mean": [0.1, 0.2]}, {"image_std": [0.1, 0.0, 0.2]}, {"image_std": "x"}])
def test_a_processor_file_with_unusable_numbers_is_refused(
    content: dict[str, Any], checkpoint: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="image_(mean|std) of"):
        Teacher.from_pretrained(with_processor(checkpoint("dinov2"), tmp_path / "odd", content))


def test_the_statistics_can_be_overridden(checkpoint: Callable[[str], str]) -> None:
    teacher = Teacher.from_pretrained(checkpoint("siglip"), image_mean=[0.485, 0.456, 0.406])
    assert teacher.image_mean == (0.485, 0.456, 0.406) and teacher.image_std == (0.2, 0.3, 0.4)
    with pytest.raises(ValueError, match="image_std of"):
        Teacher.from_pretrained(checkpoint("siglip"), image_std=[1.0, 1.0])
