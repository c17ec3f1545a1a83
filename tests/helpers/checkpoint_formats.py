"""Checkpoints of both formats: the saved one of format 1, and one of format 2 built by hand from the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


FORMAT_1 = Path(__file__).resolve().parents[1] / "fixtures" / "format_1" / "run" / "checkpoint-2"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MODULES = ("transformer", "projectors/default")

State = dict[str, torch.Tensor]


def saved_weights(module: str) -> tuple[State, State]:
    """The averaged and the trained weights of a module of the checkpoint of format 1, read without the package."""
    raw = load_file(FORMAT_1 / module / WEIGHTS_FILE)
    prefix = module.replace("/", ".") + "."
    every = load_file(FORMAT_1 / "ema.safetensors")
    ema = {name.removeprefix(prefix): value for name, value in every.items() if name.startswith(prefix)}
    return {**raw, **ema}, raw


def write_format_2(folder: Path) -> Path:
    """A checkpoint of format 2, as far as its models go."""
    trained: State = {}
    for module in MODULES:
        ema, raw = saved_weights(module)
        (folder / module).mkdir(parents=True)
        shutil.copy(FORMAT_1 / module / "config.json", folder / module)
        save_file(ema, folder / module / WEIGHTS_FILE, metadata={"format": "pt"})
        prefix = f"student.{module.replace('/', '.')}."
        trained |= {prefix + name: value for name, value in raw.items() if name != "pos_embed"}
    save_file(trained, folder / "raw.safetensors")
    (folder / "state.json").write_text(json.dumps({"format": 2, "step": 2}))
    return folder
