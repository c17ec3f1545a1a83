"""The command: its options, the order of its checks, and what it leaves to the caller."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_srepa.conversion import command
from diffusers_srepa.errors import ConfigurationError
from tests.helpers.reference_sit import random_projector, random_state


def save(folder: Path) -> Path:
    torch.save({"ema": random_state(depth=1) | random_projector("mlp"), "steps": 4000}, folder / "a.pt")
    return folder / "a.pt"


def test_the_parser_needs_nothing_heavy():
    script = (
        "import argparse, sys\n"
        "from diffusers_srepa.conversion.command import add_arguments\n"
        "parser = argparse.ArgumentParser()\n"
        "add_arguments(parser)\n"
        "parser.format_help()\n"
        "assert not {'torch', 'diffusers', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_option_has_help_and_a_place_in_the_lists():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert all(action.help for action in actions.values())
    common = {"checkpoint", "output_dir", "to", "dtype", "overwrite"}
    assert set(command._PIPELINE_OPTIONS) == set(actions) - common
    assert {name: actions[name].default for name in command._PIPELINE_OPTIONS} == command._PIPELINE_OPTIONS


def test_summary_says_what_was_found(convert, tmp_path: Path):
    result = convert("--checkpoint", save(tmp_path), "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert result.summary == (
        "REPA checkpoint, ema weights after 4000 steps: 1 block of width 32, 4 heads, patch 2, latents 4 x 8 x 8, "
        "10 classes, linear path, 1 projector"
    )
    assert result.path == tmp_path / "out" and result.repository is None and result.notes == ()


def test_a_repository_is_claimed_after_all_checks_and_before_writing(convert, tmp_path: Path):
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


def test_a_repository_that_cannot_be_claimed_stops_before_writing(convert, tmp_path: Path):
    def claim() -> str:
        raise ConfigurationError("no token.")

    with pytest.raises(ConfigurationError, match="no token"):
        convert(
            *("--checkpoint", save(tmp_path), "--output_dir", tmp_path / "out", "--num_attention_heads", 4),
            "--push_to_hub",
            claim=claim,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_without_push_nothing_is_claimed(convert, tmp_path: Path):
    def claim() -> str:
        raise AssertionError("not asked to push")

    options = ("--checkpoint", save(tmp_path), "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert convert(*options, claim=claim).repository is None
