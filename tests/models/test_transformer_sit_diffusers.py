"""SiT as a diffusers model: what users of `ModelMixin` and its relatives rely on, checked on a real tiny model.

The checks follow those that diffusers runs on its own models (`tests/models/testing_utils` there).
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_layer_skip,
)
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_srepa.models import transformer_sit
from diffusers_srepa.models.transformer_sit import SiTAttnProcessor, SiTTransformer2DModel
from tests.helpers.tiny_sit import TINY_CONFIG, tiny_inputs, tiny_sit


LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], init_lora_weights=False)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reg": {"class_token_dim": 6},
    "qk_norm": {"qk_norm": True, "sample_size": (8, 12), "out_channels": 8},
}


def inputs_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(size=config.get("sample_size", (8, 8)), dtype=dtype)
    if "class_token_dim" in config:
        inputs["class_token"] = torch.linspace(-1, 1, 12).reshape(2, 6).to(dtype)
    return inputs


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


# Outputs and training


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_tuple_equals_output_object_and_repeats(config):
    model, inputs = tiny_sit(**config), inputs_of(config)
    output = model(**inputs)
    values = model(**inputs, return_dict=False)
    assert len(values) == len(output.to_tuple()) == (2 if "class_token_dim" in config else 1)
    assert all(torch.equal(a, b) for a, b in zip(values, output.to_tuple(), strict=True))


def test_sample_does_not_depend_on_its_batch():
    model, inputs = tiny_sit(), tiny_inputs(batch_size=3)
    alone = model(**{name: value[1:2] for name, value in inputs.items()}).sample
    torch.testing.assert_close(model(**inputs).sample[1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_learns(config):
    model, inputs = tiny_sit(**config).train(), inputs_of(config)
    output = model(**inputs, class_drop_mask=torch.tensor([True, False]))
    sum(value.square().mean() for value in output.to_tuple()).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.abs().max() > 0, name


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_gradient_checkpointing_recomputes_blocks_and_keeps_gradients(config):
    model, inputs = tiny_sit(**config).double().train(), inputs_of(config, torch.float64)
    inputs["class_drop_mask"] = torch.tensor([True, False])
    sum(value.square().sum() for value in model(**inputs).to_tuple()).backward()
    expected = gradients(model)

    calls = []
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda module, args, output: calls.append(1))
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    sum(value.square().sum() for value in model(**inputs).to_tuple()).backward()
    found = gradients(model)
    assert len(calls) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)

    calls.clear()
    model.disable_gradient_checkpointing()
    sum(value.square().sum() for value in model(**inputs).to_tuple()).backward()
    assert len(calls) == 1


def test_gradients_are_those_of_finite_differences():
    model, inputs = tiny_sit(num_layers=1).double(), tiny_inputs(1, (2, 4), torch.float64)
    latents = inputs.pop("hidden_states").requires_grad_()
    assert torch.autograd.gradcheck(lambda latents: model(latents, **inputs).sample, latents)


def test_ema_of_parameters_and_copies_of_the_model():
    model, inputs = tiny_sit(), tiny_inputs()
    expected = model(**inputs).sample
    twin = copy.deepcopy(model)
    ema = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(twin(**inputs).sample, expected)
    ema.copy_to(model.parameters())
    assert torch.equal(model(**inputs).sample, expected)


# Files


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_saved_model_loads_with_the_same_output_and_config(config, tmp_path):
    model, inputs = tiny_sit(**config), inputs_of(config)
    formula = model(**inputs).sample
    model.pos_embed.mul_(1.1)  # the table of an EMA checkpoint is not quite the formula, and must be kept
    assert not torch.allclose(model(**inputs).sample, formula, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    for found, expected in zip(loaded(**inputs).to_tuple(), model(**inputs).to_tuple(), strict=True):
        assert torch.equal(found, expected)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name, value in {**TINY_CONFIG, **config}.items():
        assert saved[name] == (list(value) if isinstance(value, tuple) else value), name
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert SiTTransformer2DModel.from_config(saved).state_dict().keys() == model.state_dict().keys()


def test_shards_and_variants(tmp_path):
    model, inputs = tiny_sit(), tiny_inputs()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path / "shards")
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)

    model.save_pretrained(tmp_path / "variant", variant="ema")
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        SiTTransformer2DModel.from_pretrained(tmp_path / "variant")
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path / "variant", variant="ema")
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_loading_in_half_precision(config, dtype, tolerance, low_cpu_mem_usage, tmp_path):
    model = tiny_sit(**config)
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    sample = loaded(**inputs_of(config, dtype)).sample
    assert sample.dtype == dtype
    expected = model(**inputs_of(config)).sample
    assert (sample.float() - expected).abs().max() < tolerance * expected.abs().max()
    if "class_token_dim" not in config:
        assert loaded(**tiny_inputs(size=(4, 12), dtype=dtype)).sample.dtype == dtype


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    tiny_sit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="label_embed.weight"):
        SiTTransformer2DModel.from_pretrained(tmp_path, num_classes=20)


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_model_can_be_split_over_devices_and_disk(tmp_path):
    model, inputs = tiny_sit(), tiny_inputs()
    model.save_pretrained(tmp_path / "model")
    # "pos_embed" is a buffer of the model itself, which accelerate reports as an unknown submodule, and yet places.
    devices = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    devices |= {"pos_embed": "disk", "transformer_blocks.0": "cpu", "transformer_blocks.1": "disk"}
    loaded = SiTTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.transformer_blocks[1].modulation.weight.is_meta
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


def test_file_stands_alone(tmp_path):
    """A Hub repository ships this one file: it works as a module of any name, and imports nothing of the package."""
    source = Path(transformer_sit.__file__).read_text()
    assert "diffusers_srepa" not in source
    path = tmp_path / "shipped_transformer.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("shipped_transformer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, inputs = tiny_sit(), tiny_inputs()
    shipped = module.SiTTransformer2DModel(**TINY_CONFIG).eval()
    shipped.load_state_dict(model.state_dict())
    assert torch.equal(shipped(**inputs).sample, model(**inputs).sample)


# Precision and memory


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_autocast_keeps_the_residual_stream_in_float32(config):
    model, inputs = tiny_sit(**config).train(), inputs_of(config)
    hidden = []
    model.transformer_blocks[0].register_forward_hook(lambda module, args, output: hidden.append(output))
    inputs["class_drop_mask"] = torch.tensor([True, False])
    expected = model(**inputs).sample
    with torch.autocast("cpu", torch.bfloat16):
        sample = model(**inputs).sample
    assert hidden[1].dtype == torch.float32
    assert (sample.float() - expected).abs().max() < 0.1 * expected.abs().max()
    sample.float().sum().backward()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_layerwise_casting_stores_blocks_in_float8():
    model, inputs = tiny_sit(), tiny_inputs()
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    block = model.transformer_blocks[0]
    assert block.attn.to_q.weight.dtype == block.ff.net[2].weight.dtype == torch.float8_e4m3fn
    for layer in (block.modulation, model.time_embed.linear_1, model.label_embed, model.patch_embed.proj):
        assert layer.weight.dtype == torch.float32
    found = model(**inputs).sample
    assert 0 < (found - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(offload_type):
    model, inputs = tiny_sit(), tiny_inputs()
    expected = model(**inputs).sample
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type=offload_type, num_blocks_per_group=1)
    assert torch.equal(model(**inputs).sample, expected)


# Attention


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_fused_projections_change_nothing(config):
    model, inputs = tiny_sit(**config), inputs_of(config)
    expected = model(**inputs).sample
    model.fuse_qkv_projections()
    fused = model.transformer_blocks[0].attn
    assert fused.to_qkv.weight.shape == (48, 16)
    calls = []
    fused.to_qkv.register_forward_hook(lambda module, args, output: calls.append(1))
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
    assert calls == [1]
    model.unfuse_qkv_projections()
    assert not hasattr(fused, "to_qkv")
    assert torch.equal(model(**inputs).sample, expected)


def test_attention_processors_can_be_replaced():
    class Doubled(SiTAttnProcessor):
        def __call__(self, attn, hidden_states, factor=2.0):
            return factor * super().__call__(attn, hidden_states)

    model, inputs = tiny_sit(), tiny_inputs()
    expected = model(**inputs).sample
    assert list(model.attn_processors) == [f"transformer_blocks.{i}.attn.processor" for i in range(2)]
    model.set_attn_processor(Doubled())
    assert not torch.allclose(model(**inputs).sample, expected)
    torch.testing.assert_close(model(**inputs, attention_kwargs={"factor": 1.0}).sample, expected)
    model.set_attn_processor({name: SiTAttnProcessor() for name in model.attn_processors})
    assert torch.equal(model(**inputs).sample, expected)
    with pytest.raises(TypeError, match="factor"):
        model(**inputs, attention_kwargs={"factor": 1.0})


def test_attention_backends():
    model, inputs = tiny_sit(), tiny_inputs()
    expected = model(**inputs).sample
    try:
        model.set_attention_backend("_native_math")
        assert model.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
    finally:
        model.set_attention_backend("native")  # the choice also becomes diffusers' global default
    assert torch.equal(model(**inputs).sample, expected)
    with pytest.raises(ValueError, match="backend"):
        model.set_attention_backend("abacus")


def test_attention_gets_one_dtype_when_norms_return_float32(monkeypatch):
    """Layer norms do so under CUDA's autocast, and flash backends do not accept it."""
    model, seen = tiny_sit(qk_norm=True).bfloat16(), []
    for block in model.transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.register_forward_hook(lambda module, args, output: output.float())

    def record(query, key, value, **kwargs):
        seen.append({query.dtype, key.dtype, value.dtype})
        return dispatch_attention_fn(query, key, value, **kwargs)

    monkeypatch.setattr(transformer_sit, "dispatch_attention_fn", record)
    model(**tiny_inputs(dtype=torch.bfloat16))
    assert seen == [{torch.bfloat16}] * 2


# Adapters, caches, guidance


def test_lora_trains_alone_scales_and_survives_saving(tmp_path):
    model, inputs = tiny_sit(), tiny_inputs()
    expected = model(**inputs).sample
    model.add_adapter(copy.deepcopy(LORA))
    model.train()
    adapted = model(**inputs, class_drop_mask=torch.zeros(2, dtype=torch.bool)).sample
    assert not torch.allclose(adapted, expected, atol=1e-3)
    adapted.square().mean().backward()
    trained = {name for name, gradient in gradients(model).items() if gradient is not None}
    assert trained and all("lora_" in name for name in trained)
    assert len(trained) == 2 * 5 * 2
    model.eval()
    torch.testing.assert_close(model(**inputs, attention_kwargs={"scale": 0.0}).sample, expected)

    model.save_lora_adapter(tmp_path)
    loaded = tiny_sit()
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(loaded(**inputs).sample, adapted, atol=1e-6, rtol=1e-6)
    loaded.fuse_lora()
    torch.testing.assert_close(loaded(**inputs).sample, adapted, atol=1e-4, rtol=1e-4)
    loaded.unfuse_lora()
    loaded.disable_adapters()
    torch.testing.assert_close(loaded(**inputs).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(threshold=10.0),
        MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4, retention_ratio=0.0),
        TaylorSeerCacheConfig(disable_cache_before_step=1, cache_interval=3, max_order=1),
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    ],
    ids=lambda cache: type(cache).__name__,
)
def test_caches_reuse_earlier_steps(cache):
    model, inputs = tiny_sit(num_layers=3), tiny_inputs()
    timesteps = (900.0, 600.0, 300.0)

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        samples = []
        for timestep in timesteps:
            with model.cache_context("cond"):
                samples.append(model(**{**inputs, "timestep": timestep}).sample)
        return samples

    expected = run()
    model.enable_cache(cache)
    assert model.is_cache_enabled
    cached = run()
    torch.testing.assert_close(cached[0], expected[0], atol=1e-5, rtol=1e-5)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(cached, expected, strict=True))
    model._reset_stateful_cache()
    assert all(torch.allclose(a, b) for a, b in zip(run(), cached, strict=True))
    model.disable_cache()
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.parametrize(
    "skipped",
    [
        {"skip_attention": True, "skip_ff": True},
        {"skip_attention": True, "skip_ff": False},
        {"skip_attention": False, "skip_ff": True},
        {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    ],
    ids=["block", "attention", "feed forward", "attention scores"],
)
def test_layers_can_be_skipped_for_guidance(skipped):
    model, inputs = tiny_sit(), tiny_inputs()
    expected = model(**inputs).sample
    apply_layer_skip(model, LayerSkipConfig(indices=[1], **skipped))
    found = model(**inputs).sample
    assert found.isfinite().all()
    assert not torch.allclose(found, expected, atol=1e-3)


# Compilation: a fresh machine has no C++ compiler, so the graphs run eagerly


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("config", "checkpointing"), [(VARIANTS["reg"], False), (VARIANTS["qk_norm"], True)], ids=["reg", "checkpointing"]
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_training_compiles_to_one_graph(config, checkpointing, compiler):
    model, inputs = tiny_sit(**config, num_layers=1).train(), inputs_of(config)
    if checkpointing:
        model.enable_gradient_checkpointing()
    inputs["class_drop_mask"] = torch.tensor([True, False])
    sum(value.square().sum() for value in model(**inputs).to_tuple()).backward()
    expected = gradients(model)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    sum(value.square().sum() for value in compiled(**inputs).to_tuple()).backward()
    assert compiler.frame_count == 1
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_training_that_draws_its_own_mask_compiles(compiler):
    model = tiny_sit(num_layers=1).train()
    torch.compile(model, backend=compiler, fullgraph=True)(**tiny_inputs()).sample.sum().backward()
    assert compiler.frame_count == 1


def test_sampling_compiles_once_for_all_timesteps_and_once_for_other_sizes(compiler):
    model = tiny_sit(num_layers=1)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    with torch.no_grad():
        for timestep in (900.0, 800.0, 700.0, 600.0):
            inputs = {**tiny_inputs(), "timestep": timestep}
            torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample)
        assert compiler.frame_count <= 2
        for size in ((4, 6), (12, 10), (16, 4)):
            inputs = {**tiny_inputs(size=size), "timestep": 600.0}
            torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample, atol=1e-5, rtol=1e-5)
    assert compiler.frame_count <= 4


def test_repeated_blocks_compile(compiler):
    model, inputs = tiny_sit(), tiny_inputs()
    expected = model(**inputs).sample
    model.compile_repeated_blocks(backend=compiler, fullgraph=True)
    torch.testing.assert_close(model(**inputs).sample, expected)
    assert compiler.frame_count == 1


def test_export_with_a_free_batch_size():
    model, inputs = tiny_sit(num_layers=1), tiny_inputs()
    batch = torch.export.Dim("batch", min=2, max=16)
    exported = torch.export.export(
        model, (), kwargs=inputs, dynamic_shapes={name: {0: batch} for name in inputs}
    ).module()
    other = tiny_inputs(batch_size=5)
    torch.testing.assert_close(exported(**other)["sample"], model(**other).sample)
