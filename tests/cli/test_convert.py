"""`diffusers-srepa convert`: its options, the order of its checks, and when a repository is claimed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_srepa.cli.convert import ConvertOptions
from diffusers_srepa.configuration.command_line import load_config
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.pipelines.hub import SiTPipeline
from tests.helpers.convert_command import run_convert
from tests.helpers.reference_sit import random_projector, random_state


@pytest.fixture
def convert(assets: Path) -> Callable[..., Any]:
    """Runs the command with options as on the command line; `--vae` is there unless it is given."""
    return lambda *options, claim=None: run_convert(assets / "vae", *options, claim=claim)


def save(folder: Path) -> Path:
    torch.save({"ema": random_state(depth=1) | random_projector("mlp"), "steps": 4000}, folder / "a.pt")
    return folder / "a.pt"


def test_the_command_says_what_it_found(
    assets: Path, call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", save(tmp_path), "--vae", assets / "vae", "--output_dir", tmp_path / "out"]
    assert call("convert", *words) == 2
    assert "--num_attention_heads" in capsys.readouterr().err
    assert call("convert", *words, "--num_attention_heads", 4) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("REPA checkpoint, ema weights after 4000 steps: 1 block of width 32")
    assert printed[-1] == f"written to {tmp_path / 'out'}"
    assert SiTPipeline.from_pretrained(tmp_path / "out").transformer.config.num_attention_heads == 4
    assert call("convert", *words, "--num_attention_heads", 4) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ["--vae", "pixels"],
        ["--weights", "model"],
        ["--sample_size", "3", "4"],
        ["--scheduler", "euler"],
        ["--projector_names", "a"],
        ["--push_to_hub"],
    ],
)
def test_options_of_pipelines_have_no_meaning_for_a_state_dict(given: list[str], convert: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{given[0]} has no meaning with --to repa: leave it out."):
        convert("--to", "repa", "--checkpoint", "x", "--output_dir", "y", *given)


def test_values_are_read_as_before() -> None:
    words = "--checkpoint a.pt --output_dir out --sample_size 3 4 --projector_names 1 b --id2label none --overwrite"
    options = load_config(words.split(), ConvertOptions)
    assert options.sample_size == (3, 4) and options.projector_names == ["1", "b"]
    assert options.id2label == "none" and options.overwrite and options.vae is None and options.dtype is None


def test_summary_says_what_was_found(convert: Any, tmp_path: Path) -> None:
    result = convert("--checkpoint", save(tmp_path), "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert result.summary == (
        "REPA checkpoint, ema weights after 4000 steps: 1 block of width 32, 4 heads, patch 2, latents 4 x 8 x 8, "
        "10 classes, linear path, 1 projector"
    )
    assert result.path == tmp_path / "out" and result.repository is None and result.notes == ()


def test_a_repository_is_claimed_after_all_checks_and_before_writing(convert: Any, tmp_path: Path) -> None:
    options = ["--output_dir", tmp_path / "out", "--num_attention_heads", 4, "--push_to_hub"]
    claims = []

    def claim() -> str:
        claims.append((tmp_path / "out").exists())
        return "me/converted-sit"

    with pytest.raises(ConfigurationError, match="--num_classes"):
        convert("--checkpoint", save(tmp_path), *options, "--num_classes", 3, claim=claim)
    assert claims == []
    result = convert("--checkpoint", tmp_path / "a.pt", *options, claim=claim)
    assert claims == [False] and result.repository == "me/converted-sit"
    card = (tmp_path / "out/README.md").read_text()
    assert "# converted-sit" in card and 'SiTPipeline.from_pretrained("me/converted-sit")' in card


def test_a_repository_that_cannot_be_claimed_stops_before_writing(convert: Any, tmp_path: Path) -> None:
    def claim() -> str:
        raise ConfigurationError("no token.")

    with pytest.raises(ConfigurationError, match="no token"):
        convert(
            *("--checkpoint", save(tmp_path), "--output_dir", tmp_path / "out", "--num_attention_heads", 4),
            "--push_to_hub",
            claim=claim,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_without_push_nothing_is_claimed(convert: Any, tmp_path: Path) -> None:
    def claim() -> str:
        raise AssertionError("not asked to push")

    options = ("--checkpoint", save(tmp_path), "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert convert(*options, claim=claim).repository is None
    with pytest.raises(ConfigurationError, match="--hub_private needs --push_to_hub"):
        convert(*options, "--overwrite", "--hub_private")
