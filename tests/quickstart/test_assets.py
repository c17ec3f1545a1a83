"""The shipped autoencoder and teacher: small, loadable by their ordinary classes, and good at what they do."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from transformers import Dinov2Model

from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.teachers.auto_teacher import Teacher


pytest.importorskip("sklearn")

from digits import load_digit_split  # noqa: E402


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digit_split("test")
    return torch.from_numpy(images).float().div(255).unsqueeze(1).expand(-1, 3, -1, -1), torch.from_numpy(labels)


def test_size(quickstart: Path):
    files = [file for name in ("vae", "teacher") for file in (quickstart / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_classes_and_shapes(quickstart: Path):
    vae = AutoencoderKL.from_pretrained(quickstart / "vae")
    teacher = Dinov2Model.from_pretrained(quickstart / "teacher")
    images = torch.rand(2, 3, 32, 32)
    assert vae.encode(images).latent_dist.mean.shape == (2, 4, 8, 8)
    assert teacher(images).last_hidden_state.shape == (2, 17, 96)
    assert {parameter.dtype for model in (vae, teacher) for parameter in model.parameters()} == {torch.float32}


def test_reconstruction(quickstart: Path, held_out: tuple[torch.Tensor, torch.Tensor]):
    latent_space = AutoencoderKLLatents.from_pretrained(quickstart / "vae")
    images = held_out[0][:100]
    mean, std = latent_space.encode_moments(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    latents = latent_space.sample(mean, std, noise)
    # What the flow sees has about unit scale, so that noise and data meet on equal terms.
    assert 0.9 < float(latents.std()) < 1.1
    errors = (latent_space.decode(latents) - images).square().mean(dim=(1, 2, 3))
    assert float(-10 * errors.log10().mean()) > 30


def test_teacher_tells_classes_apart(quickstart: Path, held_out: tuple[torch.Tensor, torch.Tensor]):
    teacher = Teacher.from_pretrained(str(quickstart / "teacher"), grid=(4, 4))
    images, labels = load_digit_split("train")
    known = teacher(torch.from_numpy(images[:500]).float().div(255).unsqueeze(1).expand(-1, 3, -1, -1))
    found = teacher(held_out[0])
    assert known.class_token is not None
    assert found.class_token is not None
    pairs = [
        (known.class_token, found.class_token),
        (known.patch_tokens.mean(dim=1), found.patch_tokens.mean(dim=1)),
    ]
    classes = torch.from_numpy(labels[:500])
    for fitted, tested in pairs:
        # The nearest class mean, without any further training; chance is 10 %.
        means = torch.stack([fitted[classes == label].mean(dim=0) for label in range(10)])
        predicted = torch.cdist(tested, means).argmin(dim=1)
        assert float((predicted == held_out[1]).float().mean()) > 0.8


def test_teacher_patches_have_structure(quickstart: Path, held_out: tuple[torch.Tensor, torch.Tensor]):
    """Patch tokens of an image differ, and their similarities depend on the image: there is structure to align."""
    teacher = Teacher.from_pretrained(str(quickstart / "teacher"), grid=(4, 4))
    tokens = F.normalize(teacher(held_out[0][:100]).patch_tokens, dim=-1)
    similarities = tokens @ tokens.transpose(1, 2)  # (B, N, N)
    off_diagonal = similarities[:, ~torch.eye(16, dtype=torch.bool)]
    assert float(off_diagonal.mean()) < 0.5
    assert float(off_diagonal.std(dim=1).mean()) > 0.2
    assert float(off_diagonal.std(dim=0).mean()) > 0.1
