"""Folders of saved pipelines, precision and variants on loading, LoRA weights."""

import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from tests.helpers.tiny_pipeline import ID2LABEL, tiny_pipeline
from tests.helpers.tiny_sit import tiny_sit


def call(pipe: SiTPipeline, **kwargs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "generator": generator,
        "output_type": "pt",
        **kwargs,
    }
    return pipe([1, 2], **arguments).images


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline(guidance_channels=3).save_pretrained(folder)
    return folder


def test_save_and_load(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        loaded = SiTPipeline.from_pretrained(saved)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []
    torch.testing.assert_close(call(loaded), call(tiny_pipeline(guidance_channels=3)), rtol=0, atol=0)
    assert loaded.config.id2label == ID2LABEL and loaded.config.guidance_channels == 3
    assert not loaded.transformer.training and not loaded.vae.training

    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "SiTPipeline"
    assert index["transformer"] == ["diffusers_srepa.models.transformer_sit", "SiTTransformer2DModel"]
    assert index["scheduler"] == [
        "diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama",
        "FlowMatchEulerMaruyamaScheduler",
    ]
    assert sorted(path.name for path in (saved / "transformer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.slow
def test_load_in_a_new_process(saved: Path) -> None:
    """The modules that the folder records must be imported together with the pipeline class."""
    script = (
        "import diffusers_srepa\n"
        f"print(sorted(diffusers_srepa.SiTPipeline.from_pretrained({str(saved)!r}).components))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "['scheduler', 'transformer', 'vae']", result.stderr


def test_pickled_weights_of_older_tools_load(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.rglob("*.safetensors"))
    torch.testing.assert_close(call(SiTPipeline.from_pretrained(tmp_path)), call(pipe), rtol=0, atol=0)


def test_components(saved: Path) -> None:
    pipe = tiny_pipeline()
    assert set(pipe.components) == {"transformer", "vae", "scheduler"}
    assert pipe.parameters == {"id2label": ID2LABEL, "guidance_channels": None}
    again = SiTPipeline(**pipe.components, **pipe.parameters)
    torch.testing.assert_close(call(again), call(pipe), rtol=0, atol=0)


def test_from_pipe() -> None:
    pipe = tiny_pipeline(guidance_channels=3)
    again = SiTPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler())
    assert again.transformer is pipe.transformer and again.vae is pipe.vae
    assert again.config.id2label == ID2LABEL and again.config.guidance_channels == 3
    assert call(again).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", ["scheduler", "vae"])
def test_passed_components_are_used(saved: Path, name: str) -> None:
    component = tiny_pipeline().components[name]
    assert getattr(SiTPipeline.from_pretrained(saved, **{name: component}), name) is component


def test_another_scheduler_is_saved(saved: Path, tmp_path: Path) -> None:
    pipe = SiTPipeline.from_pretrained(saved)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
    loaded.scheduler = FlowMatchEulerMaruyamaScheduler.from_config(loaded.scheduler.config)
    torch.testing.assert_close(call(loaded, guidance_channels=4), call(tiny_pipeline()), rtol=0, atol=0)


def test_without_autoencoder(tmp_path: Path) -> None:
    pixels = tiny_pipeline(transformer=tiny_sit(in_channels=3), vae=None)
    pixels.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    assert loaded.vae is None and loaded.vae_scale_factor == 1
    torch.testing.assert_close(call(loaded), call(pixels), rtol=0, atol=0)


def test_autoencoder_dropped_after_construction(saved: Path, tmp_path: Path) -> None:
    pipe = SiTPipeline.from_pretrained(saved)
    pipe.vae = None
    output = call(pipe)
    assert output.shape == (2, 4, 8, 8)
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(call(SiTPipeline.from_pretrained(tmp_path)), output, rtol=0, atol=0)


def test_dtype_on_loading(saved: Path) -> None:
    loaded = SiTPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16
    assert call(loaded).isfinite().all()
    mixed = SiTPipeline.from_pretrained(saved, dtype={"transformer": torch.bfloat16, "default": torch.float16})
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float16)
    assert call(mixed).isfinite().all()


def test_variants(saved: Path, tmp_path: Path) -> None:
    ema = tiny_pipeline(transformer=tiny_sit(seed=7))
    tiny_pipeline().save_pretrained(tmp_path)
    ema.save_pretrained(tmp_path, variant="ema", safe_serialization=True)
    torch.testing.assert_close(call(SiTPipeline.from_pretrained(tmp_path, variant="ema")), call(ema), rtol=0, atol=0)
    torch.testing.assert_close(call(SiTPipeline.from_pretrained(tmp_path)), call(tiny_pipeline()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="variant=fp16"):
        SiTPipeline.from_pretrained(saved, variant="fp16")


def test_shards(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    torch.testing.assert_close(call(SiTPipeline.from_pretrained(tmp_path)), call(pipe), rtol=0, atol=0)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="model_index.json"):
        SiTPipeline.from_pretrained(tmp_path)


def test_saving_keeps_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# ours\n")
    tiny_pipeline().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# ours\n"


def test_device_map(saved: Path) -> None:
    loaded = SiTPipeline.from_pretrained(saved, device_map="cpu")
    torch.testing.assert_close(call(loaded), call(SiTPipeline.from_pretrained(saved)), rtol=0, atol=0)


# LoRA


def add_adapter(pipe: SiTPipeline, seed: int = 0, name: str = "default") -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name=name)


def test_lora_round_trip(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    plain = call(pipe)
    add_adapter(pipe)
    adapted = call(pipe)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    SiTPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    fresh = tiny_pipeline()
    fresh.load_lora_weights(tmp_path)
    # The scale alpha / r is not in the file, so it loads with alpha = r.
    torch.testing.assert_close(call(fresh), call(pipe, attention_kwargs={"scale": 0.5}), rtol=0, atol=1e-5)
    fresh.unload_lora_weights()
    torch.testing.assert_close(call(fresh), plain, rtol=0, atol=1e-6)


def test_lora_scale(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    plain = call(pipe)
    add_adapter(pipe)
    torch.testing.assert_close(call(pipe, attention_kwargs={"scale": 0.0}), plain, rtol=0, atol=1e-5)
    assert not torch.allclose(call(pipe, attention_kwargs={"scale": 0.5}), call(pipe), atol=1e-3)
    assert pipe.attention_kwargs is None


def test_lora_fuse() -> None:
    pipe = tiny_pipeline()
    plain = call(pipe)
    add_adapter(pipe)
    adapted = call(pipe)
    pipe.fuse_lora(lora_scale=1.0)
    assert pipe.num_fused_loras == 1
    torch.testing.assert_close(call(pipe, attention_kwargs={"scale": 1.0}), adapted, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(call(pipe), adapted, rtol=0, atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(call(pipe), plain, rtol=0, atol=1e-4)


def test_several_loras() -> None:
    pipe = tiny_pipeline()
    add_adapter(pipe, 0, "one")
    add_adapter(pipe, 1, "two")
    results = []
    for names in ("one", "two", ["one", "two"]):
        pipe.set_adapters(names)
        results.append(call(pipe))
    assert pipe.get_active_adapters() == ["one", "two"]
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert not torch.allclose(results[0], results[2], atol=1e-3)
    pipe.disable_lora()
    torch.testing.assert_close(call(pipe), call(tiny_pipeline()), rtol=0, atol=1e-5)


def test_signature_holds_what_a_diffusers_user_expects() -> None:
    """As for DiTPipeline, the class-conditional pipeline of diffusers, and every newer pipeline."""
    parameters = inspect.signature(SiTPipeline.__call__).parameters
    optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    assert set(inspect.signature(DiTPipeline.__call__).parameters) <= set(parameters)
    assert {
        "num_inference_steps",
        "num_images_per_prompt",
        "generator",
        "latents",
        "output_type",
        "return_dict",
    } <= optional
    assert set(parameters) - optional == {"self", "class_labels"}
