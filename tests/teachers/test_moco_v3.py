"""MoCo-v3 weights in the naming of timm against a plain forward with fused qkv."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.teachers.auto_teacher import Teacher


WIDTH, HEADS, DEPTH, PATCH = 384, 12, 2, 16
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def timm_weights(depth: int = DEPTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float = 0.05) -> torch.Tensor:
        return std * torch.randn(*shape, generator=generator)

    weights = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, 1 + 16, WIDTH, std=1.0),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": 1 + draw(WIDTH),
        "norm.bias": draw(WIDTH),
    }
    for index in range(depth):
        for name, rows, columns in [
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ]:
            weights[f"blocks.{index}.{name}.weight"] = draw(rows, columns)
            weights[f"blocks.{index}.{name}.bias"] = draw(rows)
        for name in ("norm1", "norm2"):
            weights[f"blocks.{index}.{name}.weight"] = 1 + draw(WIDTH)
            weights[f"blocks.{index}.{name}.bias"] = draw(WIDTH)
    return weights


def plain_forward(weights: dict[str, torch.Tensor], images: torch.Tensor, side: int) -> torch.Tensor:
    """The tokens of a plain ViT with fused qkv after its final norm, eps 1e-6."""
    resized = F.interpolate(images, size=(side * PATCH, side * PATCH), mode="bicubic")
    x = F.conv2d((resized - MEAN) / STD, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], dim=1)
    table = weights["pos_embed"][:, 1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(side, side), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    x = x + torch.cat([weights["pos_embed"][:, :1], table], dim=1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    for index in range(DEPTH):
        block = f"blocks.{index}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(2, (3, HEADS, WIDTH // HEADS))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(dim=-1)
        x = x + linear((attention @ value).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, "norm")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return timm_weights()


def check(teacher: Teacher, weights: dict[str, torch.Tensor], images: torch.Tensor) -> None:
    expected = plain_forward(weights, images, teacher.grid[0])
    features = teacher(images)
    torch.testing.assert_close(features.patch_tokens, expected[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.class_token, expected[:, 0], rtol=1e-4, atol=1e-4)
    assert teacher.model_type == "moco_v3" and teacher.patch_size == 16 and teacher.feature_dim == 384


@pytest.mark.parametrize("side", [4, 6])
def test_a_safetensors_file(side: int, weights: dict[str, torch.Tensor], images: torch.Tensor, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "moco.safetensors")
    check(Teacher.from_pretrained(str(tmp_path / "moco.safetensors"), grid=(side, side)), weights, images)


def test_an_official_training_checkpoint(
    weights: dict[str, torch.Tensor], images: torch.Tensor, tmp_path: Path
) -> None:
    state_dict = {f"module.base_encoder.{key}": tensor for key, tensor in weights.items()}
    state_dict |= {f"module.momentum_encoder.{key}": tensor + 1 for key, tensor in weights.items()}
    state_dict |= {
        "module.base_encoder.head.0.weight": torch.zeros(4, 4),
        "module.predictor.0.weight": torch.zeros(4, 4),
    }
    path = tmp_path / "vit-s-300ep.pth.tar"
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state_dict}, path)
    check(Teacher.from_pretrained(str(path)), weights, images)


def test_a_folder_without_a_config_as_uploaded_by_a_mixin(
    weights: dict[str, torch.Tensor], images: torch.Tensor, tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    check(Teacher.from_pretrained(str(tmp_path)), weights, images)
    (tmp_path / "model.safetensors").rename(tmp_path / "vit_s.safetensors")
    check(Teacher.from_pretrained(str(tmp_path), weight_name="vit_s.safetensors"), weights, images)
    with pytest.raises(ConfigurationError, match="has no file 'other.pth': check `weight_name`"):
        Teacher.from_pretrained(str(tmp_path), weight_name="other.pth")


def test_misnamed_blocks_of_the_large_file_are_repaired(tmp_path: Path) -> None:
    right = timm_weights(depth=16)
    wrong = {}
    for key, tensor in right.items():
        for index, old, new in ((13, "1", "13"), (14, "2", "14")):
            if key.startswith(f"blocks.{index}."):
                key = key.replace(f"norm{old}.", f"norm{new}.").replace(f"fc{old}.", f"fc{new}.")
        wrong[key] = tensor
    assert "blocks.13.mlp.fc13.weight" in wrong and "blocks.14.norm14.bias" in wrong
    save_file(right, tmp_path / "right.safetensors")
    save_file(wrong, tmp_path / "wrong.safetensors")
    repaired = Teacher.from_pretrained(str(tmp_path / "wrong.safetensors")).state_dict()
    expected = Teacher.from_pretrained(str(tmp_path / "right.safetensors")).state_dict()
    assert repaired.keys() == expected.keys()
    assert all(torch.equal(repaired[key], expected[key]) for key in expected)


def test_dtype_and_layer(weights: dict[str, torch.Tensor], images: torch.Tensor, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "moco.safetensors")
    teacher = Teacher.from_pretrained(str(tmp_path / "moco.safetensors"), dtype="bfloat16", layer=1)
    assert teacher.dtype == torch.bfloat16 and teacher(images).patch_tokens.shape == (2, 16, WIDTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embed.proj.weight": None}, "plain ViT in timm's naming"),
        ({"blocks.1.norm2.weight": None}, "lacks .*layernorm_after.weight"),
        ({"pos_embed": None}, "lack pos_embed"),
        ({"blocks.0.ls1.weight": torch.zeros(WIDTH)}, "'blocks.0.ls1.weight', which a plain ViT does not have"),
        ({"extra": torch.zeros(1)}, "'extra', which a plain ViT does not have"),
        ({"patch_embed.proj.weight": torch.zeros(100, 3, 16, 16)}, "width 100, but the published models have 384"),
    ],
)
def test_other_weights_are_refused(
    change: dict[str, torch.Tensor | None], message: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    changed = {key: tensor for key, tensor in (weights | change).items() if tensor is not None}
    save_file(changed, tmp_path / "moco.safetensors")
    with pytest.raises(ConfigurationError, match=message):
        Teacher.from_pretrained(str(tmp_path / "moco.safetensors"))


def test_pickled_objects_and_broken_files_are_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": weights, "args": argparse.Namespace(a=1)}, tmp_path / "objects.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("objects.pth", "broken.safetensors", "empty.pth"):
        with pytest.raises(ConfigurationError, match="cannot be read as tensors only") as caught:
            Teacher.from_pretrained(str(tmp_path / name))
        assert "\n" not in str(caught.value)
