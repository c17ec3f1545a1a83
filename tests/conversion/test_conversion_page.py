"""The commands and the Python of docs/conversion.md run, on tiny files of the names that the page uses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from diffusers_srepa.cli.convert import ConvertOptions, convert
from diffusers_srepa.configuration.command_line import load_config
from diffusers_srepa.configuration.options import options_of
from diffusers_srepa.conversion.layout import FORMATS
from tests.helpers.reference_sit import random_projector, random_state
from tests.helpers.tiny_pipeline import tiny_pipeline
from tests.helpers.tiny_run import write_vae


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "conversion.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_commands_and_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_vae(tmp_path / "stabilityai/sd-vae-ft-ema")
    sizes = {"dim": 384, "depth": 1, "rows": 1001, "dtype": torch.float32}
    torch.save(random_state(**sizes, sigma=True), "SiT-XL-2-256.pt")
    projector = {name: value.float() for name, value in random_projector("mlp", dim=384).items()}
    torch.save({"ema": random_state(**sizes) | projector}, "0400000.pt")
    tiny_pipeline().save_pretrained("runs/xl")
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    converted = [shlex.split(line)[2:] for line in lines if line.startswith("diffusers-srepa convert ")]
    assert len(converted) == 3
    for words in converted:
        convert(load_config(words, ConvertOptions), lambda: "me/repa-xl-2")
    assert Path("repa-xl-2/projectors/default").is_dir() and Path("exported/checkpoint.pt").is_file()
    (code,) = blocks("python")
    names: dict = {}
    exec(
        compile(code.replace("num_inference_steps=250", "num_inference_steps=2"), "docs/conversion.md", "exec"), names
    )
    assert names["image"].size == (16, 16) and names["pipe"].config.guidance_channels == 3


def test_every_option_is_named():
    for option in options_of(ConvertOptions):
        assert f"--{option}" in PAGE, option
    assert all(f"| {name} |" in PAGE for name in ("SiT", "REPA", "iREPA", "REG")) and len(FORMATS) == 4
