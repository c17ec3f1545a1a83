"""Every way in which official and other trainers write a checkpoint leads to the same pipeline."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.projectors import ConvProjector, LinearProjector, MLPProjector
from diffusers_srepa.conversion.class_names import imagenet_classes
from diffusers_srepa.conversion.layout import Choices, read_layout
from diffusers_srepa.conversion.read import Weights
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from diffusers_srepa.pipelines.hub import SiTPipeline
from tests.helpers.reference_sit import random_projector, random_state, reference_forward, reference_projection


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
T = torch.tensor([0.3, 0.75], dtype=torch.float64)
Y = torch.tensor([4, 10])


def transformer(folder: Path) -> SiTTransformer2DModel:
    return SiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.float64).eval()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def check_velocity(folder: Path, state: dict[str, torch.Tensor], heads: int = 4) -> None:
    with torch.no_grad():
        velocity = transformer(folder)(X, 1000 * T, Y).sample
    torch.testing.assert_close(velocity, reference_forward(state, X, T, Y, heads)[0], rtol=0, atol=1e-6)


def wrapped(state, kind):
    match kind:
        case "ddp":
            return {f"module.{name}": value for name, value in state.items()}
        case "compiled":
            return {f"_orig_mod.{name}": value for name, value in state.items()}
        case "both":
            return OrderedDict((f"module._orig_mod.{name}", value) for name, value in state.items())
        case "compiled blocks":
            return {name.replace(".attn.", "._orig_mod.attn."): value for name, value in state.items()}
        case "parameters":
            return {name: torch.nn.Parameter(value) for name, value in state.items()}


@pytest.mark.parametrize("kind", ["ddp", "compiled", "both", "compiled blocks", "parameters"])
@pytest.mark.parametrize("nested", [True, False])
def test_wrappers_are_stripped(convert, tmp_path: Path, kind: str, nested: bool):
    state = random_state() | random_projector("mlp")
    content = wrapped(state, kind)
    torch.save({"ema": content, "steps": 7} if nested else content, tmp_path / "a.pt")
    convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    check_velocity(tmp_path / "out", state)
    assert (tmp_path / "out/projectors/default/config.json").is_file()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", "", ".safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_kinds_of_files(convert, tmp_path: Path, suffix: str, legacy: bool):
    state = random_state()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    convert("--checkpoint", file, "--output_dir", tmp_path / "out", "--num_attention_heads", 4, "--format", "repa")
    check_velocity(tmp_path / "out", state)


def test_ema_is_the_default(convert, tmp_path: Path):
    ema, model = random_state(seed=1), random_state(seed=2)
    torch.save({"model": model, "ema": ema, "opt": {"state": {}, "param_groups": []}}, tmp_path / "a.pt")
    options = ("--checkpoint", tmp_path / "a.pt", "--num_attention_heads", 4, "--format", "repa")
    result = convert(*options, "--output_dir", tmp_path / "default")
    assert "ema weights" in result.summary
    check_velocity(tmp_path / "default", ema)
    convert(*options, "--weights", "ema", "--output_dir", tmp_path / "ema")
    check_velocity(tmp_path / "ema", ema)
    convert(*options, "--weights", "model", "--output_dir", tmp_path / "model")
    check_velocity(tmp_path / "model", model)


def test_model_without_an_average_is_taken_and_said(convert, tmp_path: Path):
    state = random_state()
    torch.save({"model": state}, tmp_path / "a.pt")
    result = convert(
        "--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4,
        "--format", "repa",
    )  # fmt: skip
    check_velocity(tmp_path / "out", state)
    assert "no averaged weights" in result.notes[0]


def test_legacy_blocks(convert, tmp_path: Path):
    state = random_state(depth=5) | random_projector("mlp")
    legacy = {}
    for name, value in state.items():
        number = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        legacy[name.replace(f"blocks.{number}.", f"decoder_blocks.{number - 2}.") if number >= 2 else name] = value
    assert "decoder_blocks.2.attn.qkv.weight" in legacy and "blocks.2.attn.qkv.weight" not in legacy
    torch.save({"ema": legacy}, tmp_path / "a.pt")
    result = convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert result.summary.startswith("REPA")
    check_velocity(tmp_path / "out", state)
    assert result.notes == ("the projectors read block 2: continue aligned training with --alignment.depth 2.",)
    assert "`--alignment.depth 2` the training" in (tmp_path / "out/README.md").read_text()


def test_the_depth_of_the_projectors_is_said():
    state = random_state() | random_projector("mlp")
    assert layout_of(dict(state), encoder_depth=8).encoder_depth == 8
    assert layout_of(dict(state)).encoder_depth is None


def test_tensors_may_share_memory(convert, tmp_path: Path):
    state = random_state() | random_projector("mlp")
    flat = torch.cat([value.flatten() for value in state.values()])
    pieces = flat.split([value.numel() for value in state.values()])
    shared = {name: piece.view(state[name].shape) for name, piece in zip(state, pieces, strict=True)}
    # And one tensor under two names, not contiguous.
    square = torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).t()
    for name in ("blocks.0.attn.proj.weight", "blocks.1.attn.proj.weight"):
        state[name] = shared[name] = square
    torch.save({"ema": shared}, tmp_path / "a.pt")
    convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    check_velocity(tmp_path / "out", state)


@pytest.mark.parametrize(
    ("kind", "cls", "name"),
    [
        ("mlp", MLPProjector, "REPA"),
        ("irepa-mlp", MLPProjector, "iREPA"),
        ("linear", LinearProjector, "iREPA"),
        ("conv1", ConvProjector, "iREPA"),
        ("conv3", ConvProjector, "iREPA"),
    ],
)
def test_projectors(convert, tmp_path: Path, kind: str, cls: type, name: str):
    state = random_state() | random_projector(kind)
    torch.save({"ema": state}, tmp_path / "a.pt")
    result = convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert result.summary.startswith(name)
    projector = cls.from_pretrained(tmp_path / "out/projectors/default", dtype=torch.float64)
    student = AlignedDenoiser(transformer(tmp_path / "out"), "transformer_blocks.0", projector)
    with torch.no_grad():
        _, tokens = student(X, 1000 * T, Y)
    hidden = reference_forward(state, X, T, Y, 4)[2][0]
    expected = reference_projection(state, 0, hidden, (4, 4))
    torch.testing.assert_close(tokens["default", "default"].tokens, expected, rtol=0, atol=1e-5)
    assert not any("projector" in name for name in weights_of(tmp_path / "out"))


def test_several_projectors_keep_their_order(convert, tmp_path: Path):
    state = random_state() | random_projector("mlp", 0) | random_projector("mlp", 1, out=20, hidden=12)
    torch.save({"ema": state}, tmp_path / "a.pt")
    options = ("--checkpoint", tmp_path / "a.pt", "--num_attention_heads", 4)
    convert(*options, "--output_dir", tmp_path / "out")
    for number, name in enumerate(("default", "projector_1")):
        saved = load_file(tmp_path / f"out/projectors/{name}/diffusion_pytorch_model.safetensors")
        assert torch.equal(saved["layers.4.bias"], state[f"projectors.{number}.4.bias"])
    convert(*options, "--output_dir", tmp_path / "named", "--projector_names", "dino", "clip")
    assert sorted(path.name for path in (tmp_path / "named/projectors").iterdir()) == ["clip", "dino"]
    config = json.loads((tmp_path / "named/projectors/clip/config.json").read_text())
    assert (config["in_dim"], config["hidden_dim"], config["out_dim"]) == (32, 12, 20)


def test_reg(convert, tmp_path: Path):
    state = random_state(class_token_dim=6) | random_projector("mlp")
    torch.save({"ema": state}, tmp_path / "a.pt")
    result = convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert result.summary.startswith("REG")
    class_token = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, token_velocity, _ = reference_forward(state, X, T, Y, 4, class_token)
    with torch.no_grad():
        output = transformer(tmp_path / "out")(X, 1000 * T, Y, class_token=class_token)
    torch.testing.assert_close(output.sample, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.class_token, token_velocity, rtol=0, atol=1e-6)
    images = SiTPipeline.from_pretrained(tmp_path / "out")(class_labels=[1], num_inference_steps=2).images
    assert images[0].size == (16, 16)


def test_qk_norm_shows_the_heads(convert, tmp_path: Path):
    state = random_state(head_dim=16) | random_projector("mlp")
    torch.save(state, tmp_path / "a.pt")
    convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out")
    assert transformer(tmp_path / "out").config.num_attention_heads == 2
    check_velocity(tmp_path / "out", state, heads=2)


def test_stored_positions_are_kept(convert, tmp_path: Path):
    state = random_state(dtype=torch.float32) | random_projector("mlp")
    torch.save(state, tmp_path / "a.pt")
    convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert torch.equal(weights_of(tmp_path / "out")["pos_embed"], state["pos_embed"])
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert torch.equal(loaded.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_file_is_kept_or_changed(convert, tmp_path: Path, dtype: torch.dtype):
    state = {
        name: value.to(dtype) for name, value in (random_state(dtype=torch.float32) | random_projector("mlp")).items()
    }
    torch.save(state, tmp_path / "a.pt")
    options = ("--checkpoint", tmp_path / "a.pt", "--num_attention_heads", 4)
    convert(*options, "--output_dir", tmp_path / "kept")
    assert {value.dtype for value in weights_of(tmp_path / "kept").values()} == {dtype}
    convert(*options, "--output_dir", tmp_path / "cast", "--dtype", "bfloat16")
    cast = weights_of(tmp_path / "cast")
    assert {value.dtype for value in cast.values()} == {torch.bfloat16}
    assert torch.equal(cast["label_embed.weight"], state["y_embedder.embedding_table.weight"].bfloat16())
    projector = load_file(tmp_path / "cast/projectors/default/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in projector.values()} == {torch.bfloat16}
    vae = load_file(tmp_path / "cast/vae/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in vae.values()} == {torch.float32}


@pytest.mark.parametrize("preset", SIT_PRESETS)
@pytest.mark.parametrize("image_size", [256, 512])
def test_official_sizes_are_recognised(preset: str, image_size: int):
    size = SIT_PRESETS[preset]
    dim, grid = size["num_attention_heads"] * size["attention_head_dim"], image_size // 8 // size["patch_size"]
    state = random_state(
        dim=dim, depth=size["num_layers"], patch=size["patch_size"], grid=(grid, grid), rows=1001, sigma=True,
        device="meta", dtype=torch.float32,
    )  # fmt: skip
    layout = read_layout(Weights(state), Choices())
    expected = {
        **size,
        "sample_size": image_size // 8,
        "in_channels": 4,
        "mlp_ratio": 4.0,
        "num_classes": 1000,
        "class_dropout_prob": 0.1,
        "qk_norm": False,
        "class_token_dim": None,
    }
    assert layout.format == "sit" and layout.config == expected and layout.model_name == preset


def layout_of(state, choices: Choices | None = None, **arguments):
    heads = Choices(num_attention_heads=4)
    return read_layout(Weights(state, "ema", arguments), choices or heads)


def test_the_runs_arguments_decide_where_names_do_not():
    with pytest.raises(ConfigurationError, match="`format` sit or `format` repa"):
        layout_of(random_state())
    assert layout_of(random_state(), enc_type="dinov2-vit-b", proj_coeff=0.5, path_type="linear").format == "repa"
    assert layout_of(random_state(), path_type="Linear", prediction="velocity", loss_weight=None).format == "sit"
    assert layout_of(random_state(), path_type="cosine", prediction="v", encoder_depth=8).path_type == "cosine"


def test_classes():
    choices = Choices(format="repa", num_attention_heads=4)
    config = layout_of(random_state(), choices, num_classes=10, cfg_prob=0.2).config
    assert (config["num_classes"], config["class_dropout_prob"]) == (10, 0.2)
    config = layout_of(random_state(rows=10), choices, num_classes=10).config
    assert (config["num_classes"], config["class_dropout_prob"]) == (10, 0.0)
    with pytest.raises(ConfigurationError, match="`num_classes` 1000 or `num_classes` 999"):
        layout_of(random_state(rows=1000), choices)
    choices = Choices(format="repa", num_attention_heads=4, num_classes=1000)
    config = layout_of(random_state(rows=1000), choices).config
    assert (config["num_classes"], config["class_dropout_prob"]) == (1000, 0.0)


def test_rectangular_latents(convert, tmp_path: Path):
    state = random_state(grid=(2, 8)) | random_projector("mlp")
    torch.save(state, tmp_path / "a.pt")
    convert(
        "--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4,
        "--sample_size", 4, 16,
    )  # fmt: skip
    x = X.reshape(2, 4, 4, 16)
    with torch.no_grad():
        velocity = transformer(tmp_path / "out")(x, 1000 * T, Y).sample
    torch.testing.assert_close(velocity, reference_forward(state, x, T, Y, 4)[0], rtol=0, atol=1e-6)


def test_class_names(convert, tmp_path: Path):
    state = random_state(rows=1001, depth=1) | random_projector("mlp")
    torch.save(state, tmp_path / "a.pt")
    options = ("--checkpoint", tmp_path / "a.pt", "--num_attention_heads", 4)
    convert(*options, "--output_dir", tmp_path / "out")
    pipe = SiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.get_label_ids(["golden retriever", "Tinca tinca", "toilet paper", "macaw"]) == [207, 0, 999, 88]
    assert 'class_labels=["tench"]' in (tmp_path / "out/README.md").read_text()
    convert(*options, "--output_dir", tmp_path / "none", "--id2label", "none")
    assert SiTPipeline.from_pretrained(tmp_path / "none").config.id2label is None
    (tmp_path / "names.json").write_text(json.dumps([f"thing {number}" for number in range(1000)]))
    convert(*options, "--output_dir", tmp_path / "own", "--id2label", tmp_path / "names.json")
    assert SiTPipeline.from_pretrained(tmp_path / "own").get_label_ids("thing 12") == [12]


def test_imagenet_classes():
    classes = imagenet_classes()
    assert list(classes) == [str(number) for number in range(1000)]
    assert classes["1"] == "goldfish, Carassius auratus" and classes["285"] == "Egyptian cat"
    assert classes["134"] == classes["517"] == "crane"
    assert len(set(classes.values())) == 999


def test_pixels_need_no_autoencoder(convert, tmp_path: Path):
    torch.save(random_state(channels=3) | random_projector("mlp"), tmp_path / "a.pt")
    convert(
        "--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4,
        "--vae", "pixels",
    )  # fmt: skip
    pipe = SiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.vae is None and pipe.config.guidance_channels is None


def test_the_folder_says_nothing_of_this_machine(convert, tmp_path: Path, vae: str):
    args = argparse.Namespace(enc_type="dinov2-vit-b", data_dir="/secret/data")
    torch.save({"ema": random_state(), "args": args, "steps": 1000}, tmp_path / "a.pt")
    convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    for file in (tmp_path / "out").rglob("*"):
        if file.suffix in (".json", ".md"):
            text = file.read_text()
            assert str(tmp_path) not in text and vae not in text and "secret" not in text, file
    card = (tmp_path / "out/README.md").read_text()
    assert "REPA" in card and "1,000 training steps" in card and "averaged weights" in card
    assert "license:" not in card


def test_euler_scheduler(convert, tmp_path: Path):
    torch.save(random_state() | random_projector("mlp"), tmp_path / "a.pt")
    convert(
        "--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4,
        "--scheduler", "euler",
    )  # fmt: skip
    pipe = SiTPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipe(class_labels=[3], num_inference_steps=2, guidance_scale=2.0).images[0].size == (16, 16)
