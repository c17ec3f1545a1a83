"""Every family against a direct computation with its own class of `transformers`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch.nn import functional as F

from diffusers_srepa.teachers.auto_teacher import Teacher
from diffusers_srepa.teachers.families import TABLE


MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
PATCH = 8

# checkpoint -> vision class, prefix tokens, whether token 0 is a class token
FAMILIES = {
    "dinov2": ("Dinov2Model", 1, True),
    "dinov2_classifier": ("Dinov2Model", 1, True),
    "dinov2_giant": ("Dinov2Model", 1, True),
    "webssl": ("Dinov2Model", 1, True),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", 4, True),
    "dinov3_vit": ("DINOv3ViTModel", 5, True),
    "vit": ("ViTModel", 1, True),
    "vit_mae": ("ViTMAEModel", 1, True),
    "ijepa": ("IJepaModel", 0, False),
    "clip": ("CLIPVisionModel", 1, True),
    "clip_vision_model": ("CLIPVisionModel", 1, True),
    "siglip": ("SiglipVisionModel", 0, False),
    "siglip_vision_model": ("SiglipVisionModel", 0, False),
    "siglip2": ("Siglip2VisionModel", 0, False),
}


def pixel_values(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    resized = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    return (resized - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)


def resampled(table: torch.Tensor, num_prefix: int, grid: tuple[int, int]) -> torch.Tensor:
    """A position table (rows, D) of a 4 x 4 grid for another grid, as timm's resampler does it."""
    patch_rows = table[num_prefix:].float().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    patch_rows = F.interpolate(patch_rows, size=grid, mode="bicubic", antialias=True)
    return torch.cat([table[:num_prefix], patch_rows.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1)])


def reference_model(folder: str, class_name: str, side: int) -> torch.nn.Module:
    """The vision class itself, configured for a grid of side x side, with the resampled table as its weights."""
    vision_class = getattr(transformers, class_name)
    model = vision_class.from_pretrained(folder, dtype=torch.float32)
    keys = [key for key in model.state_dict() if "position_embedding" in key]
    if side == 4 or not keys or class_name == "Siglip2VisionModel":
        return model.eval()
    state_dict = model.state_dict()
    table = state_dict[keys[0]]
    rows = table.reshape(-1, table.shape[-1])
    new_rows = resampled(rows, rows.shape[0] - 16, (side, side))
    state_dict[keys[0]] = new_rows if table.ndim == 2 else new_rows.unsqueeze(0)
    model.config.image_size = side * PATCH
    model = vision_class(model.config)
    model.load_state_dict(state_dict)
    return model.eval()


@torch.no_grad()
def reference_tokens(model: torch.nn.Module, class_name: str, pixels: torch.Tensor) -> torch.Tensor:
    batch_size, _, height, width = pixels.shape
    num_patches = (height // PATCH) * (width // PATCH)
    if class_name == "ViTMAEModel":
        model.config.mask_ratio = 0.0
        noise = torch.arange(num_patches).repeat(batch_size, 1).float()
        states = model(pixels, noise=noise, output_hidden_states=True).hidden_states
        return states[-1]
    if class_name == "Siglip2VisionModel":
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
        patches = patches.unflatten(2, (3, PATCH, PATCH)).permute(0, 1, 3, 4, 2).flatten(2)
        shapes = torch.tensor([[height // PATCH, width // PATCH]] * batch_size)
        mask = torch.ones(batch_size, num_patches, dtype=torch.long)
        return model(patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
    return model(pixels).last_hidden_state


@pytest.mark.parametrize("side", [4, 6, 3])
@pytest.mark.parametrize("kind", FAMILIES)
def test_family_equals_its_class(kind: str, side: int, checkpoint: Callable[[str], str], images: torch.Tensor) -> None:
    class_name, num_prefix, has_class_token = FAMILIES[kind]
    teacher = Teacher.from_pretrained(checkpoint(kind), grid=(side, side))
    reference = reference_model(checkpoint(kind), class_name, side)
    expected = reference_tokens(reference, class_name, pixel_values(images, (side * PATCH, side * PATCH)))

    features = teacher(images)

    assert type(teacher.model) is type(reference)
    assert expected.std() > 0.1, "a reference without variation proves nothing"
    torch.testing.assert_close(features.patch_tokens, expected[:, num_prefix:], rtol=1e-4, atol=1e-5)
    assert features.grid == (side, side)
    assert teacher.has_class_token is has_class_token
    assert teacher.num_prefix_tokens == num_prefix
    assert teacher.feature_dim == features.patch_tokens.shape[-1] == 32
    assert teacher.patch_size == PATCH and teacher.input_size == (side * PATCH, side * PATCH)
    if has_class_token:
        torch.testing.assert_close(features.class_token, expected[:, 0], rtol=1e-4, atol=1e-5)
    else:
        assert features.class_token is None


@pytest.mark.parametrize("grid", [(6, 3), (2, 5)])
@pytest.mark.parametrize("kind", ["dinov2", "vit", "ijepa", "clip", "siglip"])
def test_rectangular_grid_equals_blocks_on_a_table_resampled_by_hand(
    kind: str, grid: tuple[int, int], checkpoint: Callable[[str], str]
) -> None:
    images = torch.rand(2, 3, 10 * grid[0], 10 * grid[1], generator=torch.Generator().manual_seed(2))
    model = reference_model(checkpoint(kind), FAMILIES[kind][0], 4)
    embeddings = model.embeddings
    is_clip = kind in ("clip", "siglip")
    projection = embeddings.patch_embedding if is_clip else embeddings.patch_embeddings.projection
    table = embeddings.position_embedding.weight if is_clip else embeddings.position_embeddings[0]
    class_row = {"clip": "class_embedding", "vit": "cls_token", "dinov2": "cls_token"}.get(kind)
    with torch.no_grad():
        pixels = pixel_values(images, (grid[0] * PATCH, grid[1] * PATCH))
        hidden = projection(pixels).flatten(2).transpose(1, 2)
        if class_row:
            hidden = torch.cat([getattr(embeddings, class_row).reshape(1, 1, -1).expand(2, 1, -1), hidden], dim=1)
        hidden = hidden + resampled(table, int(class_row is not None), grid)
        hidden = model.pre_layrnorm(hidden) if kind == "clip" else hidden
        blocks = (
            model.layers if kind in ("vit", "ijepa") else getattr(model.encoder, "layers", None) or model.encoder.layer
        )
        for block in blocks:
            hidden = block(hidden, None)
        hidden = {"clip": lambda x: x, "siglip": getattr(model, "post_layernorm", None)}.get(
            kind, getattr(model, "layernorm", None)
        )(hidden)

    features = Teacher.from_pretrained(checkpoint(kind), grid=grid)(images)

    assert features.grid == grid
    torch.testing.assert_close(features.patch_tokens, hidden[:, int(class_row is not None) :], rtol=1e-4, atol=1e-5)


def test_rectangular_rotary_and_naflex_towers(checkpoint: Callable[[str], str]) -> None:
    images = torch.rand(2, 3, 60, 30, generator=torch.Generator().manual_seed(3))
    for kind in ("dinov3_vit", "siglip2"):
        class_name, num_prefix, _ = FAMILIES[kind]
        reference = reference_model(checkpoint(kind), class_name, 4)
        expected = reference_tokens(reference, class_name, pixel_values(images, (48, 24)))
        features = Teacher.from_pretrained(checkpoint(kind), grid=(6, 3))(images)
        torch.testing.assert_close(features.patch_tokens, expected[:, num_prefix:], rtol=1e-4, atol=1e-5)


def test_masked_autoencoder_keeps_every_token_in_order(checkpoint: Callable[[str], str]) -> None:
    teacher = Teacher.from_pretrained(checkpoint("vit_mae"))
    images = torch.full((1, 3, 32, 32), 0.5)
    blank = teacher(images).patch_tokens
    changed = images.clone()
    changed[:, :, 8:16, 16:24] = 0.0  # the patch in row 1, column 2
    moved = (teacher(changed).patch_tokens - blank).norm(dim=-1)[0]
    assert moved.argmax() == 1 * 4 + 2
    torch.testing.assert_close(teacher(images).patch_tokens, blank, rtol=0, atol=0)


def test_clip_and_mae_tokens_are_taken_before_the_last_norm(
    checkpoint: Callable[[str], str], images: torch.Tensor
) -> None:
    clip = Teacher.from_pretrained(checkpoint("clip"))
    mae = Teacher.from_pretrained(checkpoint("vit_mae"))
    clip_tokens, mae_tokens = clip(images).patch_tokens, mae(images).patch_tokens
    for module in (clip.model.post_layernorm, mae.model.layernorm):
        module.weight.data.zero_()
        module.bias.data.zero_()
    assert torch.equal(clip(images).patch_tokens, clip_tokens)
    assert torch.equal(mae(images).patch_tokens, mae_tokens)


def test_dual_encoders_are_loaded_without_their_text_half(checkpoint: Callable[[str], str]) -> None:
    for kind in ("clip", "siglip", "siglip2"):
        names = [name for name, _ in Teacher.from_pretrained(checkpoint(kind)).named_parameters()]
        assert names and not any("text" in name or "projection_" in name or "logit" in name for name in names)


@pytest.mark.parametrize(
    "kind", ["dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "vit_mae", "clip", "siglip2"]
)
def test_layer_taps_the_output_of_that_block(
    kind: str, checkpoint: Callable[[str], str], images: torch.Tensor
) -> None:
    class_name, num_prefix, has_class_token = FAMILIES[kind]
    reference = reference_model(checkpoint(kind), class_name, 4)
    captured: list[torch.Tensor] = []
    for module in reference.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == 2:
            for block in module:
                block.register_forward_hook(lambda block, args, output: captured.append(output))
    reference_tokens(reference, class_name, pixel_values(images, (32, 32)))
    assert len(captured) == 2
    for layer in (1, 2):
        features = Teacher.from_pretrained(checkpoint(kind), layer=layer)(images)
        torch.testing.assert_close(features.patch_tokens, captured[layer - 1][:, num_prefix:], rtol=1e-5, atol=1e-6)
        if has_class_token:
            torch.testing.assert_close(features.class_token, captured[layer - 1][:, 0], rtol=1e-5, atol=1e-6)


def test_blocks_after_the_tapped_one_are_dropped(checkpoint: Callable[[str], str]) -> None:
    whole = Teacher.from_pretrained(checkpoint("dinov2"))
    tapped = Teacher.from_pretrained(checkpoint("dinov2"), layer=1)
    assert len(whole.model.encoder.layer) == 2 and len(tapped.model.encoder.layer) == 1


@pytest.mark.parametrize("layer", [0, 3, -1, 1.0, True, "1"])
def test_layer_outside_the_blocks_is_refused(layer: object, checkpoint: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="`layer` .* must be an integer from 1 to 2"):
        Teacher.from_pretrained(checkpoint("dinov2"), layer=layer)


@pytest.mark.parametrize(
    ("kind", "class_name", "num_prefix"), [("vit_msn", "ViTMSNModel", 1), ("deit", "DeiTModel", 2)]
)
def test_generic_rule_counts_the_prefix_tokens(
    kind: str, class_name: str, num_prefix: int, checkpoint: Callable[[str], str], images: torch.Tensor
) -> None:
    assert kind not in TABLE
    for side in (4, 6):
        teacher = Teacher.from_pretrained(checkpoint(kind), grid=(side, side))
        reference = reference_model(checkpoint(kind), class_name, side)
        expected = reference_tokens(reference, class_name, pixel_values(images, (side * PATCH, side * PATCH)))
        features = teacher(images)
        assert teacher.num_prefix_tokens == num_prefix and teacher.model_type == kind
        torch.testing.assert_close(features.patch_tokens, expected[:, num_prefix:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.class_token, expected[:, 0], rtol=1e-4, atol=1e-5)


def test_generic_rule_reaches_the_vision_half_of_a_dual_encoder(
    checkpoint: Callable[[str], str], images: torch.Tensor
) -> None:
    teacher = Teacher.from_pretrained(checkpoint("metaclip_2"))
    reference = transformers.MetaClip2VisionModel.from_pretrained(checkpoint("metaclip_2"), dtype=torch.float32).eval()
    expected = reference_tokens(reference, "MetaClip2VisionModel", pixel_values(images, (32, 32)))
    torch.testing.assert_close(teacher(images).patch_tokens, expected[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "message"), [("swin", "not a vision transformer"), ("bert", "no patch_size")])
def test_models_that_are_no_vision_transformers_are_refused(
    kind: str, message: str, checkpoint: Callable[[str], str]
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Teacher.from_pretrained(checkpoint(kind))
    assert kind in str(caught.value) and "docs/teachers.md" in str(caught.value)


def test_table_is_keyed_by_model_type_and_names_classes_that_exist() -> None:
    assert {"dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "moco_v3", "vit_mae", "ijepa"} <= set(TABLE)
    assert {"clip", "clip_vision_model", "siglip", "siglip_vision_model", "siglip2"} <= set(TABLE)
    for model_type, row in TABLE.items():
        assert row.model_type == model_type
        assert hasattr(transformers, str(row.vision_class))
