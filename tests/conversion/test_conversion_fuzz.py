"""Random damage to checkpoints: every outcome is a pipeline or one sentence, and a refusal writes nothing."""

from __future__ import annotations

import argparse
import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_srepa.errors import ConfigurationError
from tests.helpers.reference_sit import random_projector, random_state


# The same cases at every run; FUZZ_ROUNDS and FUZZ_SEED look at more of them.
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "40"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))

ODD_VALUES: list[Any] = [
    None,
    3,
    "text",
    [],
    {},
    torch.tensor(1.0),
    torch.zeros(0),
    torch.zeros(2, 3, 4, 5, 6),
    torch.full((32,), float("nan")),
    torch.zeros(32, dtype=torch.int64),
    torch.zeros(32, dtype=torch.bool),
    torch.zeros(32, 32).to_sparse(),
    torch.zeros(32, dtype=torch.complex64),
    torch.empty(32, device="meta"),
]
ODD_KEYS: list[Any] = [
    3,
    "",
    ".",
    "blocks.x.attn.qkv.weight",
    "blocks.-1.attn.qkv.weight",
    "blocks.99999.mlp.fc1.bias",
    "ß",
]


def _content() -> dict[str, Any]:
    arguments = argparse.Namespace(encoder_depth=1, path_type="linear", prediction="v", enc_type="dinov2-vit-b")
    return {"ema": random_state(depth=1) | random_projector("mlp"), "args": arguments, "steps": 4000}


def _mutated(rng: random.Random) -> Any:
    content = _content()
    for _ in range(rng.choice([1, 1, 2])):
        state = content["ema"]
        key = rng.choice(list(state))
        kind = rng.choice(["drop", "odd", "rename", "resize", "dtype", "add", "top", "arguments"])
        if kind == "drop":
            del state[key]
        elif kind == "odd":
            state[key] = rng.choice(ODD_VALUES)
        elif kind == "rename":
            state[rng.choice(ODD_KEYS)] = state.pop(key)
        elif kind == "resize" and isinstance(state[key], torch.Tensor) and state[key].layout == torch.strided:
            state[key] = torch.cat([state[key], state[key]]) if state[key].ndim else state[key].reshape(1, 1)
        elif kind == "dtype" and isinstance(state[key], torch.Tensor):
            state[key] = state[key].to(rng.choice([torch.float16, torch.bfloat16, torch.float64]))
        elif kind == "add":
            state[rng.choice(ODD_KEYS)] = rng.choice(ODD_VALUES)
        elif kind == "top":
            content[rng.choice(["ema", "model", "args", "steps", "other"])] = rng.choice(ODD_VALUES)
            if not isinstance(content["ema"], dict) or not content["ema"]:
                return content
        else:
            name = rng.choice(["encoder_depth", "path_type", "prediction", "enc_type", "num_classes", "resolution"])
            if isinstance(content["args"], argparse.Namespace):
                setattr(content["args"], name, rng.choice([None, -1, 10**30, "linear", "x", 2.5, [], True]))
    return content


def _outcome(convert: Callable[..., Any], tree: Callable[[Path], Any], folder: Path, file: Path) -> str:
    before = tree(folder)
    try:
        convert("--checkpoint", file, "--output_dir", folder / "out", "--num_attention_heads", 4)
    except ConfigurationError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 500 and message.endswith((".", "?")), message
        assert tree(folder) == before
        return "refused"
    assert (folder / "out" / "model_index.json").exists()
    return "converted"


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[int], Path]:
    def make(number: int) -> Path:
        folder = tmp_path / str(number)
        folder.mkdir()
        return folder

    return make


def test_mutated_contents(convert, tree, folder_of) -> None:
    rng = random.Random(f"contents {SEED}")
    outcomes = set()
    for number in range(ROUNDS):
        file = folder_of(number) / "a.pt"
        torch.save(_mutated(rng), file)
        outcomes.add(_outcome(convert, tree, file.parent, file))
    assert outcomes == {"converted", "refused"}


def test_garbled_bytes(convert, tree, folder_of) -> None:
    rng = random.Random(f"bytes {SEED}")
    buffer = io.BytesIO()
    torch.save(_content(), buffer)
    whole = buffer.getvalue()
    for number in range(ROUNDS):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            place = rng.randrange(len(data))
            kind = rng.choice(["flip", "cut", "delete", "insert", "zero"])
            if kind == "flip":
                data[place] ^= 1 << rng.randrange(8)
            elif kind == "cut":
                del data[max(place, 1) :]
            elif kind == "delete":
                del data[place : place + rng.randrange(1, 64)]
            elif kind == "insert":
                data[place:place] = rng.randbytes(rng.randrange(1, 64))
            else:
                data[place : place + 16] = bytes(16)
            data = data or bytearray(b"\0")
        file = folder_of(number) / "a.pt"
        file.write_bytes(bytes(data))
        _outcome(convert, tree, file.parent, file)
