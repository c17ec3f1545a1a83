"""Pipelines become state dicts of REPA and REG again, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusers_srepa.alignment.projectors import MLPProjector
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from tests.helpers.checkpoint_formats import FORMAT_1, MODULES, saved_weights, write_format_2
from tests.helpers.reference_sit import random_projector, random_state, reference_forward
from tests.helpers.tiny_pipeline import tiny_pipeline


STATES = {
    "repa": lambda: random_state() | random_projector("mlp"),
    "two encoders": lambda: random_state() | random_projector("mlp", 0) | random_projector("mlp", 1, out=20),
    "no projector": lambda: random_state(),
    "irepa conv": lambda: random_state() | random_projector("conv3"),
    "irepa linear": lambda: random_state() | random_projector("linear"),
    "reg": lambda: random_state(class_token_dim=6) | random_projector("mlp"),
    "qk_norm": lambda: random_state(head_dim=8) | random_projector("mlp"),
}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STATES)
def test_round_trip(convert, tmp_path: Path, kind: str, dtype: torch.dtype):
    state = {name: value.to(dtype) for name, value in STATES[kind]().items()}
    torch.save({"ema": state}, tmp_path / "a.pt")
    options = [] if kind != "no projector" else ["--format", "repa"]
    convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4, *options)
    result = convert("--to", "repa", "--checkpoint", tmp_path / "out", "--output_dir", tmp_path / "back")
    assert result.path == tmp_path / "back/checkpoint.pt"
    # As REPA's and REG's generate.py read it.
    loaded = torch.load(result.path, map_location="cpu", weights_only=True)
    check_equal(loaded["ema"], state)
    check_equal(loaded["model"], state)
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert result.path.stat().st_size < 1.5 * size + 50_000, "both entries are stored once"


def test_mixed_dtypes_are_kept(convert, tmp_path: Path):
    state = {name: value.bfloat16() if "mlp" in name else value.float() for name, value in STATES["repa"]().items()}
    torch.save(state, tmp_path / "a.pt")
    convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    result = convert("--to", "repa", "--checkpoint", tmp_path / "out", "--output_dir", tmp_path / "back.pt")
    assert result.path == tmp_path / "back.pt"
    check_equal(torch.load(result.path)["ema"], state)


def test_a_pipeline_of_this_package(convert, tmp_path: Path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    model = pipe.transformer
    MLPProjector(model.inner_dim, 16, hidden_dim=24).save_pretrained(tmp_path / "pipe/projectors/default")
    result = convert("--to", "repa", "--checkpoint", tmp_path / "pipe", "--output_dir", tmp_path / "out")
    state = torch.load(result.path)["ema"]
    size = model.config.sample_size
    x = torch.randn(2, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0.2, 0.9]), torch.tensor([1, 4])
    with torch.no_grad():
        expected = model.eval()(x, 1000 * t, y).sample
    velocity, _, _ = reference_forward(state, x, t, y, model.config.num_attention_heads)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 1e-3 and "projectors.0.4.weight" in state
    assert "official sizes" in " ".join(result.notes) and "strict=False" not in " ".join(result.notes)


def test_shards_and_dtype(convert, tmp_path: Path):
    model = SiTTransformer2DModel(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8)
    model.save_pretrained(tmp_path / "pipe/transformer", max_shard_size="60KB")
    assert len(list((tmp_path / "pipe/transformer").glob("*.safetensors"))) > 1
    result = convert(
        "--to", "repa", "--checkpoint", tmp_path / "pipe", "--output_dir", tmp_path / "out", "--dtype", "bfloat16"
    )
    state = torch.load(result.path)["ema"]
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert torch.equal(state["y_embedder.embedding_table.weight"], model.label_embed.weight.bfloat16())
    assert "strict=False" in " ".join(result.notes)


def test_what_cannot_be_exported(convert, tmp_path: Path, tree):
    def refused(source: Path | str, *options: str | Path, output: Path = tmp_path / "out") -> str:
        before = tree(tmp_path)
        with pytest.raises(ConfigurationError) as caught:
            convert("--to", "repa", "--checkpoint", source, "--output_dir", output, *options)
        assert tree(tmp_path) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    sizes = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3}
    for name, changed in {
        "good": {},
        "sigma": {"out_channels": 8},
        "eps": {"norm_eps": 1e-5},
        "wide": {"sample_size": (4, 8)},
    }.items():
        SiTTransformer2DModel(**{**sizes, **changed}).save_pretrained(tmp_path / name / "transformer")
    assert "out_channels 8" in refused(tmp_path / "sigma")
    assert "norm_eps" in refused(tmp_path / "eps")
    assert "no square" in refused(tmp_path / "wide")
    assert "no folder transformer" in refused(tmp_path / "good" / "transformer")
    assert "nobody/nothing is neither a local folder nor in the cache" in refused("nobody/nothing")
    torch.save({}, tmp_path / "a.pt")
    assert "is a file" in refused(tmp_path / "a.pt")
    assert "own folder" in refused(tmp_path / "good", output=tmp_path / "good")
    assert "exists" in refused(tmp_path / "good", output=tmp_path / "a.pt")
    assert "--vae has no meaning" in refused(tmp_path / "good", "--vae", "pixels")
    assert "--push_to_hub has no meaning" in refused(tmp_path / "good", "--push_to_hub")
    (tmp_path / "good/projectors/default").mkdir(parents=True)
    assert "unknown class" in refused(tmp_path / "good")
    (tmp_path / "good/projectors/default").rmdir()
    weights = tmp_path / "good/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "cannot be loaded" in refused(tmp_path / "good")
    config = tmp_path / "good/transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "DiTTransformer2DModel"}))
    assert "DiTTransformer2DModel" in refused(tmp_path / "good")
    config.write_text("{")
    assert "no valid JSON" in refused(tmp_path / "good")


def test_overwrite(convert, tmp_path: Path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "a.pt").write_text("old")
    result = convert(
        "--to", "repa", "--checkpoint", tmp_path / "pipe", "--output_dir", tmp_path / "a.pt", "--overwrite"
    )
    assert "ema" in torch.load(result.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "pipe"]


@pytest.mark.parametrize("saved_format", [1, 2])
def test_a_checkpoint_has_its_average_under_ema_and_what_was_trained_under_model(
    convert, tmp_path: Path, saved_format: int
):
    source = FORMAT_1 if saved_format == 1 else write_format_2(tmp_path / "checkpoint-2")
    result = convert("--to", "repa", "--checkpoint", source, "--output_dir", tmp_path / "out")
    exported = torch.load(result.path, weights_only=True)
    for entry, number in (("ema", 0), ("model", 1)):
        transformer, projector = (saved_weights(module)[number] for module in MODULES)
        state = exported[entry]
        assert torch.equal(state["final_layer.linear.weight"], transformer["proj_out.weight"])
        assert torch.equal(state["pos_embed"], transformer["pos_embed"])
        queries = state["blocks.1.attn.qkv.weight"][:8]
        assert torch.equal(queries, transformer["transformer_blocks.1.attn.to_q.weight"])
        assert torch.equal(state["projectors.0.4.bias"], projector["layers.4.bias"])
    assert set(exported["ema"]) == set(exported["model"])
    assert not torch.equal(exported["ema"]["projectors.0.4.bias"], exported["model"]["projectors.0.4.bias"])
