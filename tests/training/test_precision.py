"""Precisions through the whole method: the student in half precision, the alignment in float32."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.training.method import StepContext
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.run_losses import plain_context


def _trainer(assets: Path, folder: Path, *options: str) -> Trainer:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(folder), *options]
    return Trainer(load_training_config(arguments))


def _batch(trainer: Trainer) -> dict[str, torch.Tensor]:
    batches = trainer._batches()
    batch = next(batches)
    batches.close()
    return batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reaches_the_student_and_the_teacher_but_not_the_alignment(
    assets: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    trainer = _trainer(assets, tmp_path)
    seen: dict[str, Any] = {}
    attention, teacher = trainer.method.transformer.transformer_blocks[0].attn, trainer.method.teachers["default"]
    attention.to_q.register_forward_hook(lambda module, inputs, output: seen.update(query=output.dtype))
    teacher.register_forward_hook(lambda module, inputs, output: seen.update(target=output.patch_tokens.double()))
    trainer.modules["student"].register_forward_hook(lambda module, inputs, output: seen.update(tokens=output[1]))
    # The module as accelerate has not wrapped it in autocast, as under FSDP2.
    student = trainer.accelerator.unwrap_model(trainer.training.wrapped["student"], keep_fp32_wrapper=False)
    autocast = partial(torch.autocast, "cpu", dtype=dtype)
    output = trainer.method.loss(
        _batch(trainer), StepContext(0, {"student": student}, trainer.ema.of_module, autocast)
    )
    assert seen["query"] == dtype
    student = F.normalize(seen["tokens"]["default", "default"].tokens.detach().double(), dim=-1)
    target = F.normalize(seen["target"], dim=-1)
    count = student.shape[1]
    difference = student @ student.mT - target @ target.mT
    gram = difference.square().sum((1, 2)).mean() / (count * (count - 1))
    # In bfloat16 both would be off by some 1e-3.
    assert output.parts["alignment/cosine"].item() == pytest.approx(
        -(student * target).sum(-1).mean().item(), abs=1e-6
    )
    assert output.parts["alignment/gram_mse"].item() == pytest.approx(gram.item(), rel=1e-5)
    assert output.loss.dtype == torch.float32


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("preset", ["srepa-mse", "srepa-kl", "irepa+srepa"])
def test_a_teacher_whose_tokens_are_all_zero_gives_no_nan(
    assets: Path, tmp_path: Path, preset: str, precision: str
) -> None:
    trainer = _trainer(assets, tmp_path, "--alignment.preset", preset, "--training.mixed_precision", precision)
    norm = trainer.method.teachers["default"].model.layernorm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.zero_()
    output = trainer.method.loss(_batch(trainer), plain_context(trainer))
    assert output.parts["alignment/cosine"] == 0 and torch.isfinite(output.loss)
    output.loss.backward()
    for name, parameter in trainer.modules["student"].named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
