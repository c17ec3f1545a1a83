"""Training checkpoints as pipelines; the folders are built by hand from tiny pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.pipelines.hub import SiTPipeline
from tests.helpers.tiny_autoencoder import tiny_autoencoder
from tests.helpers.tiny_pipeline import tiny_pipeline
from tests.helpers.tiny_sit import tiny_sit


FORMAT_1 = Path(__file__).resolve().parents[1] / "fixtures" / "format_1" / "run" / "checkpoint-2"


def sample(pipe: SiTPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([1, 2], num_inference_steps=2, generator=generator, output_type="pt").images


def write_checkpoint(pipe: SiTPipeline, folder: Path, **reference: Any) -> Path:
    """A checkpoint of format 2 in `folder`, of a run whose autoencoder is beside it."""
    checkpoint = folder / "checkpoint-100"
    pipe.save_pretrained(checkpoint)
    pipe.transformer.save_pretrained(checkpoint / "projectors" / "default")
    for name, text in {"state.json": '{"format": 2}', "raw.safetensors": "", "config.yaml": "seed: 0\n"}.items():
        (checkpoint / name).write_text(text)
    if pipe.vae is not None:
        shutil.rmtree(checkpoint / "vae")
        pipe.vae.save_pretrained(folder / "autoencoder")
        trained = AutoencoderKLLatents(AutoencoderKL.from_pretrained(folder / "autoencoder"))
        where = {
            "pretrained_model_name_or_path": str(folder / "autoencoder"),
            "subfolder": None,
            "revision": None,
            "encoder_id": trained.encoder_id,
        }
        (checkpoint / "autoencoder.json").write_text(json.dumps({**where, **reference}))
    return checkpoint


def test_a_checkpoint_is_a_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline(guidance_channels=3)
    checkpoint = write_checkpoint(pipe, tmp_path)
    loaded = SiTPipeline.from_pretrained(checkpoint)
    assert type(loaded) is SiTPipeline and loaded.config.guidance_channels == 3
    assert loaded.vae.dtype == torch.float32 and not loaded.vae.training
    assert torch.equal(sample(loaded), sample(pipe))
    assert torch.equal(sample(SiTPipeline.from_pretrained(str(checkpoint), device_map="cpu")), sample(pipe))


def test_what_is_saved_from_a_checkpoint_is_complete(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    SiTPipeline.from_pretrained(write_checkpoint(pipe, tmp_path)).save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "autoencoder")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"model_index.json", "scheduler", "transformer", "vae"}
    assert torch.equal(sample(SiTPipeline.from_pretrained(tmp_path / "saved")), sample(pipe))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"dtype": {"transformer": torch.float16, "default": torch.bfloat16}}, torch.bfloat16),
        ({"dtype": {"vae": torch.float16}}, torch.float16),
        ({"dtype": {"transformer": torch.bfloat16}}, torch.float32),
    ],
)
def test_precision(tmp_path: Path, given: dict[str, Any], expected: torch.dtype) -> None:
    loaded = SiTPipeline.from_pretrained(write_checkpoint(tiny_pipeline(), tmp_path), **given)
    assert loaded.vae.dtype == expected


def test_an_autoencoder_inside_a_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "whole")
    for subfolder in (None, "vae"):
        reference = {"pretrained_model_name_or_path": str(tmp_path / "whole"), "subfolder": subfolder}
        checkpoint = write_checkpoint(pipe, tmp_path / str(subfolder), **reference)
        assert torch.equal(sample(SiTPipeline.from_pretrained(checkpoint)), sample(pipe))


def test_pixels(tmp_path: Path) -> None:
    pipe = tiny_pipeline(transformer=tiny_sit(in_channels=3), vae=None)
    checkpoint = write_checkpoint(pipe, tmp_path)
    assert json.loads((checkpoint / "model_index.json").read_text())["vae"] == [None, None]
    loaded = SiTPipeline.from_pretrained(checkpoint)
    assert loaded.vae is None and torch.equal(sample(loaded), sample(pipe))


def test_an_autoencoder_that_is_passed(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    checkpoint = write_checkpoint(pipe, tmp_path, pretrained_model_name_or_path=str(tmp_path / "gone"))
    assert SiTPipeline.from_pretrained(checkpoint, vae=pipe.vae).vae is pipe.vae
    assert SiTPipeline.from_pretrained(checkpoint, vae=None).vae is None


def refusal(checkpoint: Path) -> str:
    with pytest.raises(ConfigurationError) as error:
        SiTPipeline.from_pretrained(checkpoint)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and ". " not in message, message
    return message


def test_an_autoencoder_that_is_gone(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tiny_pipeline(), tmp_path)
    shutil.rmtree(tmp_path / "autoencoder")
    message = refusal(checkpoint)
    assert str(tmp_path / "autoencoder") in message and str(checkpoint) in message and "pass `vae=`" in message


def test_an_autoencoder_on_the_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tiny_pipeline(), tmp_path, pretrained_model_name_or_path="me/autoencoder")
    message = refusal(checkpoint)
    assert "the autoencoder me/autoencoder" in message and "pass `vae=`" in message


def test_another_encoder(tmp_path: Path) -> None:
    """A different decoder is no reason to refuse, a different encoder is."""
    pipe = tiny_pipeline()
    checkpoint = write_checkpoint(pipe, tmp_path)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(1.0)
    pipe.vae.save_pretrained(tmp_path / "autoencoder")
    assert torch.equal(sample(SiTPipeline.from_pretrained(checkpoint)), sample(pipe))
    tiny_autoencoder(seed=1).save_pretrained(tmp_path / "autoencoder")
    message = refusal(checkpoint)
    assert "is not the one that the checkpoint" in message and "`vae=`" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null"])
def test_a_damaged_reference(tmp_path: Path, content: str) -> None:
    checkpoint = write_checkpoint(tiny_pipeline(), tmp_path)
    (checkpoint / "autoencoder.json").write_text(content)
    message = refusal(checkpoint)
    assert "autoencoder.json of the checkpoint" in message and "pass `vae=`" in message


def test_without_a_reference_there_is_no_fall_back_to_pixels(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tiny_pipeline(), tmp_path)
    (checkpoint / "autoencoder.json").unlink()
    with pytest.raises(OSError):
        SiTPipeline.from_pretrained(checkpoint)


def test_a_checkpoint_of_format_1() -> None:
    message = refusal(FORMAT_1)
    assert str(FORMAT_1) in message and "resume it with the trainer" in message


def test_a_saved_pipeline_of_format_1() -> None:
    assert sample(SiTPipeline.from_pretrained(FORMAT_1.parent)).isfinite().all()
