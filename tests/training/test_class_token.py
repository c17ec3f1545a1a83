"""REG by its presets: what is noised, predicted and aligned, alone, with sREPA, and without the token in the Gram."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.run_losses import plain_context


PATCHES_ALONE = ["--alignment.terms.gram_mse.objective.include_prefix_tokens", "false"]


def build(assets: Path, output_dir: Path, *options: str) -> Trainer:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir), *options]
    return Trainer(load_training_config([*arguments, "--training.max_steps", "3"]))


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", ["reg", "reg+srepa"])
def test_a_run_by_preset_samples_with_a_guided_class_token(assets: Path, tmp_path: Path, preset: str) -> None:
    build(assets, tmp_path, "--alignment.preset", preset).train()
    for record in metrics(tmp_path):
        total = record["flow"] + 0.03 * record["class_token"] + 0.5 * record["alignment/cosine"]
        if preset == "reg+srepa":
            total += 2.0 * record["alignment/gram_mse"]
        else:
            assert "alignment/gram_mse" not in record
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    pipe = SiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.class_token_dim == 24
    tokens: list[torch.Tensor] = []

    def keep(pipeline: SiTPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        tokens.append(tensors["class_token"])
        return tensors

    for scale in (0.0, 3.0):
        images = pipe(
            [0, 1],
            num_inference_steps=3,
            guidance_scale=3.0,
            class_token_guidance_scale=scale,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["class_token"],
        ).images
        assert images.shape == (2, 3, 16, 16)
    assert len(tokens) == 6 and tokens[2].shape == (2, 24) and not torch.equal(tokens[2], tokens[5])


@pytest.mark.parametrize("options", [[], PATCHES_ALONE], ids=["all tokens", "patches in the Gram"])
def test_the_loss_of_one_batch_by_hand(assets: Path, tmp_path: Path, options: list[str]) -> None:
    trainer = build(assets, tmp_path, "--alignment.preset", "reg+srepa", *options)
    with torch.no_grad():
        for parameter in trainer.modules["student"].parameters():
            # A freshly initialised SiT predicts exactly zero, whatever it is given.
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    seen: dict[str, Any] = {}

    def keep_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.update(x_t=args[0], t=args[1] / 1000, class_token=kwargs["class_token"], output=output)

    trainer.modules["student"].transformer.register_forward_hook(keep_call, with_kwargs=True)
    tapped = trainer.modules["student"].transformer.transformer_blocks[0]
    tapped.register_forward_hook(lambda module, args, output: seen.update(hidden=output))
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    batch = {"pixel_values": pixels, "class_labels": labels, "position": torch.arange(4), "index": torch.arange(4)}
    output = trainer.method.loss(batch, plain_context(trainer))

    features = trainer.method.teachers["default"](pixels.float() / 255)
    t = seen["t"].view(4, 1)
    noise = (seen["class_token"] - (1 - t) * features.class_token) / t
    assert 0.8 < noise.std() < 1.2 and noise.mean().abs() < 0.3
    class_loss = F.mse_loss(seen["output"].class_token, noise - features.class_token)
    torch.testing.assert_close(output.parts["class_token"], class_loss, rtol=1e-3, atol=1e-4)

    student = trainer.modules["student"].projectors["default"].layers(seen["hidden"])
    teacher = torch.cat([features.class_token[:, None], features.patch_tokens], dim=1)
    assert student.shape == teacher.shape == (4, 17, 24)
    cosine = -F.cosine_similarity(student, teacher, dim=-1).mean()
    torch.testing.assert_close(output.parts["alignment/cosine"], cosine.detach(), rtol=1e-4, atol=1e-5)
    start, size = (1, 16) if options else (0, 17)
    ours, theirs = (F.normalize(tokens[:, start:], dim=-1) for tokens in (student, teacher))
    gram = (ours @ ours.mT - theirs @ theirs.mT).square().sum() / (4 * size * (size - 1))
    torch.testing.assert_close(output.parts["alignment/gram_mse"], gram.detach(), rtol=1e-4, atol=1e-6)
    total = output.parts["flow"] + 0.03 * class_loss + 0.5 * cosine + 2.0 * gram
    torch.testing.assert_close(output.loss, total, rtol=1e-4, atol=1e-5)


def test_the_flag_keeps_the_token_out_of_the_gram_of_a_run(assets: Path, tmp_path: Path) -> None:
    build(assets, tmp_path / "with", "--alignment.preset", "reg+srepa").train()
    build(assets, tmp_path / "without", "--alignment.preset", "reg+srepa", *PATCHES_ALONE).train()
    first, second = (metrics(tmp_path / name)[0] for name in ("with", "without"))
    assert first["alignment/cosine"] == second["alignment/cosine"] and first["class_token"] == second["class_token"]
    assert first["alignment/gram_mse"] != second["alignment/gram_mse"]


def test_a_teacher_without_a_class_token_is_refused(assets: Path, tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    options = ["--alignment.preset", "reg", "--teacher.name_or_path", str(tmp_path / "siglip")]
    with pytest.raises(ConfigurationError, match="reg denoises the teacher's class token, but .* has none: change"):
        build(assets, tmp_path / "run", *options)
