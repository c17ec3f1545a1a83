"""Aligned training goes on from a converted pipeline, projectors included: `--model.init_from`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import nn

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.tokens import TokenMap
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.reference_sit import State, random_projector, random_state, reference_forward, reference_projection
from tests.helpers.run_losses import plain_context
from tests.helpers.tiny_run import CLASSES, write_assets


HEADS, DIM, DEPTH = 2, 24, 3
SIZES = {"dim": DIM, "depth": DEPTH, "rows": len(CLASSES) + 1, "dtype": torch.float32}
TEACHER_WIDTH = 24


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def start(assets: Path, convert, tmp_path: Path) -> Callable[..., Trainer]:
    """Converts a state dict and builds the trainer of a run that starts from it."""

    def build(state: State, form: str, *options: str) -> Trainer:
        torch.save({"ema": state}, tmp_path / "a.pt")
        convert(
            *("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "converted", "--format", form),
            *("--num_attention_heads", HEADS),
        )
        arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(tmp_path / "run")]
        arguments += ["--model.init_from", str(tmp_path / "converted"), "--alignment.depth", "2"]
        return Trainer(load_training_config([*arguments, "--training.max_steps", "1", *options]))

    return build


class ReferenceStudent(nn.Module):
    """What the official checkpoint computes in the place of the trained student."""

    def __init__(self, state: State, form: str) -> None:
        super().__init__()
        self.state, self.form = state, form

    def forward(self, noisy, timestep, class_labels, class_drop_mask, class_token=None) -> tuple[Any, ...]:
        labels = class_labels.masked_fill(class_drop_mask, len(CLASSES))
        time = timestep / 1000
        if self.form == "sit":
            velocity, _, hidden = reference_forward(self.state, noisy, 1 - time, labels, HEADS)
            velocity = -velocity
        else:
            velocity, token, hidden = reference_forward(self.state, noisy, time, labels, HEADS, class_token)
        tokens = reference_projection(self.state, 0, hidden[1], (4, 4))
        maps = {("default", "default"): TokenMap(tokens, (4, 4), tokens.shape[1] - 16)}
        return (velocity, maps) if class_token is None else (velocity, maps, token)


def first_loss(trainer: Trainer, state: State, form: str) -> dict[str, float]:
    """The raw losses of the run's first step, from the checkpoint."""
    context = replace(plain_context(trainer), modules={"student": ReferenceStudent(state, form)})
    with closing(trainer._batches()) as batches, torch.no_grad():
        output = trainer.method.loss(next(batches), context)
    return {name: value.item() for name, value in output.parts.items()}


@pytest.mark.parametrize("form", ["repa", "reg"])
def test_the_first_step_is_that_of_the_checkpoint(start, tmp_path: Path, form: str):
    state = random_state(**SIZES, class_token_dim=TEACHER_WIDTH if form == "reg" else None)
    state |= {
        name: value.float() for name, value in random_projector("mlp", dim=DIM, hidden=16, out=TEACHER_WIDTH).items()
    }
    options = ["--alignment.preset", "reg"] if form == "reg" else []
    trainer = start(state, form, *options)

    projector = trainer.modules["student"].projectors["default"].state_dict()
    assert torch.equal(projector["layers.0.weight"], state["projectors.0.0.weight"])
    assert torch.equal(projector["layers.4.bias"], state["projectors.0.4.bias"])
    assert torch.equal(trainer.method.transformer.pos_embed, state["pos_embed"][:, -16:])
    qkv = state["blocks.1.attn.qkv.weight"]
    assert torch.equal(trainer.method.transformer.transformer_blocks[1].attn.to_k.weight, qkv[DIM : 2 * DIM])

    expected = first_loss(trainer, state, form)
    trainer.train()
    (record,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"flow", "alignment/cosine"} <= set(expected) and expected["flow"] > 0.5
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name

    trained = load_file(tmp_path / "run/projectors/default/diffusion_pytorch_model.safetensors")
    assert trained.keys() == projector.keys()
    assert not torch.equal(trained["layers.0.weight"], state["projectors.0.0.weight"])


def test_a_sit_without_projector_gets_a_new_one(start, tmp_path: Path):
    state = random_state(**SIZES, sigma=True)
    trainer = start(state, "sit")
    own = {
        name.replace("layers", "projectors.0"): value.clone()
        for name, value in trainer.modules["student"].projectors["default"].state_dict().items()
    }
    expected = first_loss(trainer, state | own, "sit")
    trainer.train()
    (record,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_a_projector_of_another_kind_is_refused(start):
    state = random_state(**SIZES)
    state |= {name: value.float() for name, value in random_projector("conv3", dim=DIM, out=TEACHER_WIDTH).items()}
    with pytest.raises(ConfigurationError, match="holds a ConvProjector, but this projector is a MLPProjector"):
        start(state, "irepa")
