"""Checkpoints as the Hub has them: names, shards, pickles, old configs; and the sizes of the paper's encoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.teachers.auto_teacher import Teacher
from tests.helpers.tiny_teachers import build_model, write_processor


# Some tensors that the public repositories hold under these names; a second block proves the numbering.
HUB_NAMES = {
    "dinov2": ["encoder.layer.1.attention.attention.query.weight", "encoder.layer.1.layer_scale1.lambda1"],
    "dinov2_giant": ["encoder.layer.1.mlp.weights_in.weight", "layernorm.weight"],
    "dinov2_with_registers": ["embeddings.register_tokens", "encoder.layer.1.mlp.fc1.weight"],
    "dinov3_vit": ["embeddings.register_tokens", "layer.1.attention.q_proj.weight", "norm.weight"],
    "vit": ["encoder.layer.1.attention.attention.query.weight", "encoder.layer.1.layernorm_before.weight"],
    "vit_mae": ["vit.encoder.layer.1.attention.attention.query.weight", "decoder.mask_token"],
    "ijepa": ["encoder.layer.1.attention.attention.query.weight", "layernorm.weight"],
    "clip": ["vision_model.pre_layrnorm.weight", "visual_projection.weight", "text_model.final_layer_norm.weight"],
    "siglip": ["vision_model.encoder.layers.1.self_attn.q_proj.weight", "vision_model.head.probe", "logit_bias"],
    "siglip2": ["vision_model.encoder.layers.1.self_attn.q_proj.weight", "text_model.head.weight"],
}


@pytest.mark.parametrize("kind", HUB_NAMES)
def test_these_checkpoints_have_the_names_of_the_public_ones(kind: str, checkpoint: Callable[[str], str]) -> None:
    assert set(HUB_NAMES[kind]) <= set(load_file(Path(checkpoint(kind)) / "model.safetensors"))


@pytest.mark.parametrize("kind", ["vit_mae", "vit", "clip"])
def test_a_checkpoint_in_pickles_alone(
    kind: str, checkpoint: Callable[[str], str], images: torch.Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint(kind), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    expected = Teacher.from_pretrained(checkpoint(kind), grid=(6, 6))(images)
    assert torch.equal(Teacher.from_pretrained(str(folder), grid=(6, 6))(images).patch_tokens, expected.patch_tokens)


@pytest.mark.parametrize("kind", ["dinov2_giant", "dinov3_vit", "ijepa", "clip"])
def test_a_checkpoint_in_shards(
    kind: str, checkpoint: Callable[[str], str], images: torch.Tensor, tmp_path: Path
) -> None:
    build_model(kind).save_pretrained(tmp_path, max_shard_size="30KB")
    write_processor(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    expected = Teacher.from_pretrained(checkpoint(kind))(images)
    assert torch.equal(Teacher.from_pretrained(str(tmp_path))(images).patch_tokens, expected.patch_tokens)


def test_an_old_dual_encoder_with_position_ids_and_doubled_configs(
    checkpoint: Callable[[str], str], images: torch.Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("clip"), folder)
    tensors = load_file(folder / "model.safetensors")
    for half, length in (("vision", 17), ("text", 77)):
        tensors[f"{half}_model.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    doubled = {f"{half}_config_dict": dict(config[f"{half}_config"]) for half in ("vision", "text")}
    (folder / "config.json").write_text(json.dumps({**config, **doubled, "torch_dtype": "float16"}))
    # As the processors of its time were written: no rescaling is mentioned.
    processor = {"feature_extractor_type": "CLIPFeatureExtractor", "do_normalize": True, "crop_size": 224}
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | statistics))
    expected = Teacher.from_pretrained(checkpoint("clip"), grid=(6, 6))(images)
    features = Teacher.from_pretrained(str(folder), grid=(6, 6))(images)
    assert torch.equal(features.patch_tokens, expected.patch_tokens)


def test_a_processor_inside_the_file_of_all_processors(checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("siglip"), folder)
    processor = folder / "preprocessor_config.json"
    values = json.loads(processor.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert Teacher.from_pretrained(str(folder)).image_mean == (0.1, 0.2, 0.3)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "SiglipProcessor"}))
    assert Teacher.from_pretrained(str(folder)).image_mean == (0.4, 0.5, 0.6)
    processor.unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert Teacher.from_pretrained(str(folder)).image_mean == (0.1, 0.2, 0.3)


def with_processor(folder: str, target: Path, content: str) -> str:
    shutil.copytree(folder, target)
    (target / "preprocessor_config.json").write_text(content)
    return str(target)


@pytest.mark.parametrize("content", ["{", "[1]", '{"rescale_factor": "a"}', '{"rescale_factor": -1}'])
def test_a_broken_processor_is_no_missing_one(content: str, checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    folder = with_processor(checkpoint("dinov2"), tmp_path / "copy", content)
    with pytest.raises(ConfigurationError, match=r"preprocessor_config\.json") as caught:
        Teacher.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["0.0", "null"])
def test_a_rescale_factor_that_says_nothing_is_the_usual_one(
    value: str, checkpoint: Callable[[str], str], tmp_path: Path
) -> None:
    folder = with_processor(checkpoint("dinov2"), tmp_path / "copy", f'{{"rescale_factor": {value}}}')
    assert Teacher.from_pretrained(folder).image_mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list, but must hold a mapping"),
        ({"model_type": 3}, "says model_type 3, which is no name"),
        ({"model_type": ["dinov2"]}, "which is no name"),
        ({"model_type": "dinov2", "patch_size": 0}, "says patch_size 0, but patches have a positive number"),
        ({"model_type": "dinov2", "patch_size": "a"}, "cannot be loaded .*patch_size"),
        ({"model_type": "resnet"}, "type 'resnet' is not a vision transformer"),
        ({"model_type": "clip_text_model"}, "type 'clip_text_model' is not a vision transformer"),
        ({"architecture": "vit_small_patch16_224", "pretrained_cfg": {}}, "is a checkpoint of timm .*weight_name"),
    ],
)
def test_configs_that_are_no_teachers_get_one_sentence(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=message) as caught:
        Teacher.from_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_options_of_another_type_get_one_sentence(checkpoint: Callable[[str], str]) -> None:
    folder = checkpoint("dinov2")
    for options, message in (
        ({"subfolder": 3}, "subfolder of the teacher .* is 3, but must be text"),
        ({"revision": 3}, "revision of the teacher .* is 3, but must be text"),
        ({"weight_name": "model.safetensors"}, "`weight_name` and a config.json without model_type are for MoCo-v3"),
        ({"weight_name": "config.json"}, "it holds other objects, or is no checkpoint"),
        ({"image_mean": "imagenet"}, "image_mean of .* must be three numbers"),
        ({"image_std": [-1, 1, 1]}, "image_std of .* no image can be normalised: give `image_mean` and `image_std`"),
        ({"dtype": "bf16"}, "`dtype` must be a floating-point dtype of torch, but is 'bf16'"),
    ):
        with pytest.raises(ConfigurationError, match=message) as caught:
            Teacher.from_pretrained(folder, **options)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    with pytest.raises(ConfigurationError, match="`name_or_path` is empty"):
        Teacher.from_pretrained("")


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (2, 3, 0, 0)])
def test_no_images_get_one_sentence(shape: tuple[int, ...], checkpoint: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="images must not be empty, but have shape"):
        Teacher.from_pretrained(checkpoint("dinov2"))(torch.zeros(shape))


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
NARROW = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_ratio": 1}

# The encoders of the paper's Table 6 and their relatives, narrow, with the image and patch sizes of their configs.
SIZES: dict[str, tuple[str, dict[str, Any], int]] = {
    "DINOv2": ("Dinov2Model", {**NARROW, "image_size": 518, "patch_size": 14}, 224),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", {**NARROW, "image_size": 518, "patch_size": 14}, 224),
    "WebSSL": ("Dinov2Model", {**NARROW, "image_size": 224, "patch_size": 14, "use_mask_token": False}, 224),
    "DINOv3-B": ("DINOv3ViTModel", {**SMALL, "image_size": 224, "patch_size": 16, "num_register_tokens": 4}, 256),
    "DINO v1, MoCo-v3": ("ViTModel", {**SMALL, "image_size": 224, "patch_size": 16}, 256),
    "MAE-L": ("ViTMAEModel", {**SMALL, "image_size": 224, "patch_size": 16}, 256),
    "I-JEPA-H": ("IJepaModel", {**SMALL, "image_size": 224, "patch_size": 14}, 224),
    "CLIP-L": ("CLIPVisionModel", {**SMALL, "image_size": 224, "patch_size": 14}, 224),
    "SigLIP-B": ("SiglipVisionModel", {**SMALL, "image_size": 256, "patch_size": 16}, 256),
    "SigLIP-so400m": ("SiglipVisionModel", {**SMALL, "image_size": 224, "patch_size": 14}, 224),
}


@pytest.mark.parametrize("name", SIZES)
def test_input_is_grid_times_patch_at_256_and_512_pixels(name: str, tmp_path: Path) -> None:
    class_name, arguments, side = SIZES[name]
    model_class = getattr(transformers, class_name)
    model_class(model_class.config_class(**arguments)).save_pretrained(tmp_path)
    for pixels, grid, size in ((256, 16, side), (512, 32, 2 * side)):
        teacher = Teacher.from_pretrained(tmp_path, grid=(grid, grid))
        assert teacher.input_size == (size, size)
        features = teacher(torch.rand(1, 3, pixels, pixels))
        assert features.patch_tokens.shape == (1, grid * grid, 8) and features.grid == (grid, grid)
