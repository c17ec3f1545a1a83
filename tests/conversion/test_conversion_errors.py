"""Input that cannot be converted: one sentence, no file written, nothing run."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusers_srepa.conversion import convert as convert_module
from diffusers_srepa.errors import ConfigurationError
from tests.helpers.reference_sit import random_projector, random_state


def repa(**sizes: Any) -> dict[str, torch.Tensor]:
    return random_state(**{"depth": 1, **sizes}) | random_projector("mlp")


def change(**replaced: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A REPA state dict with entries replaced (`__` stands for a dot), or taken out by None."""
    state = repa()
    for key, value in replaced.items():
        name = key.replace("__", ".")
        state.pop(name, None)
        if value is not None:
            state[name] = value
    return state


@pytest.fixture
def refuse(convert, tmp_path: Path, tree) -> Callable[..., str]:
    """Runs the command on a file that is saved first, sees it refused without a trace, and returns the sentence."""

    def run(content: Any, *options: Any, file: str = "checkpoint.pt") -> str:
        path = tmp_path / file
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        before = tree(tmp_path)
        words = ["--checkpoint", path, "--output_dir", tmp_path / "new" / "out", *options]
        if "--num_attention_heads" not in options:
            words += ["--num_attention_heads", 4]
        with pytest.raises(ConfigurationError) as caught:
            convert(*words)
        assert tree(tmp_path) == before
        message = str(caught.value)
        assert "\n" not in message and message.endswith((".", "?")) and len(message) < 500, message
        return message

    return run


def saved(content: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def test_files_that_are_none(refuse, tmp_path: Path):
    assert "no file" in refuse(None, file="absent.pt")
    assert "empty" in refuse(b"")
    assert "text file" in refuse(b"<!DOCTYPE html><html><body>Access denied</body></html>")
    assert "text file" in refuse(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    assert "text file" in refuse("Zugriff verweigert: \u00fc".encode() * 20)
    assert "unknown kind" in refuse(b"\x89PNG\r\n\x1a\n" + bytes(200))
    assert "folder" in refuse(None, file=".")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.9, 0.999])
def test_truncated_torch_files(refuse, legacy: bool, share: float):
    content = saved({"ema": repa()}, _use_new_zipfile_serialization=not legacy)
    message = refuse(content[: int(share * len(content))])
    assert "truncated, damaged or no checkpoint" in message


def test_truncated_safetensors(refuse, tmp_path: Path):
    save_file(repa(), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for share in (0.01, 0.5, 0.99):
        assert "truncated" in refuse(content[: int(share * len(content))], file="cut.safetensors")


def test_other_zip_files(refuse, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    assert "no checkpoint" in refuse(None, file="some.zip")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "scripted.pt")
    assert "TorchScript" in refuse(None, file="scripted.pt")


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 4", "in args", "safetensors suffix"])
def test_pickled_code_is_not_run(refuse, tmp_path: Path, form: str):
    marker = tmp_path.parent / f"{tmp_path.name}-marker"
    bad = Malicious(marker)
    content = (
        {"ema": repa(), "args": argparse.Namespace(bad=bad)} if form == "in args" else {"ema": repa(), "bad": bad}
    )
    if form.startswith("pickle"):
        data = pickle.dumps(bad, protocol=int(form[-1]))
    else:
        data = saved(content, _use_new_zipfile_serialization=form != "legacy")
    message = refuse(data, file="a.safetensors" if "suffix" in form else "a.pt")
    assert not marker.exists()
    assert "unpickling" in message
    assert form == "pickle 4" or "posix.mkdir" in message
    # Really unpickled, the same bytes do run code.
    if form.startswith("pickle"):
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()


def test_only_namespaces_are_allowed(refuse):
    message = refuse({"ema": repa(), "args": argparse.Namespace(data_dir=PurePosixPath("/data"))})
    assert "pathlib" in message and "unpickling" in message
    message = refuse({"ema": repa(), "model": torch.nn.Linear(2, 2)})
    assert "torch.nn.modules.linear.Linear" in message


def test_contents_that_are_no_weights(refuse):
    assert "a list" in refuse([1, 2])
    assert "a Tensor" in refuse(torch.zeros(3))
    assert "no weights" in refuse({})
    assert "no weights" in refuse({"ema": {}})
    assert "no tensors (epoch, lr)" in refuse({"epoch": 3, "lr": 0.1})
    assert "name 3" in refuse({3: torch.zeros(1)})
    assert "none of SiT" in refuse({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)})
    assert "conv1.weight, fc.bias" in refuse({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)})
    assert "dtype torch.int64" in refuse(change(pos_embed=torch.zeros(1, 16, 32, dtype=torch.int64)))
    assert "sparse" in refuse(change(pos_embed=torch.zeros(16, 32).to_sparse()))
    assert "two tensors for x_embedder.proj.bias" in refuse(
        repa() | {"module.x_embedder.proj.bias": torch.zeros(32)},
    )
    assert "diffusers transformer" in refuse({"transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)})


def test_weights_that_are_not_there(refuse):
    assert "--weights ema" in refuse({"ema": repa()}, "--weights", "model")
    assert "--weights model" in refuse({"model": repa()}, "--weights", "ema")
    assert "bare state dict" in refuse(repa(), "--weights", "ema")


def test_names_are_said(refuse):
    assert "lacks blocks.0.attn.qkv.bias:" in refuse(change(blocks__0__attn__qkv__bias=None))
    assert "the unknown blocks.0.attn.gate:" in refuse(change(blocks__0__attn__gate=torch.zeros(3)))
    state = repa(depth=3)
    gap = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    assert "blocks.1.adaLN_modulation.1.bias" in refuse(gap) and "and 7 more" in refuse(gap)
    assert "t_embedder.mlp.2.bias" in refuse(change(t_embedder__mlp__2__bias=None, extra=torch.zeros(1)))
    assert "lacks pos_embed" in refuse(change(pos_embed=None))
    assert "wg_norm" in refuse({name: value for name, value in reg().items() if not name.startswith("wg_norm")})
    assert "cls_projectors2.weight" in refuse(reg() | {"cls_projectors2.weight": torch.zeros(3)})
    assert "projectors.0 lacks 2.bias" in refuse(change(projectors__0__2__bias=None))
    assert "projectors.0 has the unknown 6.bias" in refuse(change(projectors__0__6__bias=torch.zeros(2)))
    assert "projectors [1]" in refuse({name.replace("projectors.0", "projectors.1"): v for name, v in repa().items()})
    assert "projectors.weight" in refuse(repa() | {"projectors.weight": torch.zeros(1)})


def reg() -> dict[str, torch.Tensor]:
    return random_state(depth=1, class_token_dim=6)


def test_shapes_that_do_not_fit(refuse):
    message = refuse(change(blocks__0__attn__proj__weight=torch.zeros(16, 32)))
    assert "blocks.0.attn.proj.weight" in message and "(16, 32)" in message and "(32, 32)" in message
    assert "x_embedder.proj.weight" in refuse(change(x_embedder__proj__weight=torch.zeros(32, 16)))
    assert "17 rows" in refuse(change(final_layer__linear__weight=torch.zeros(17, 32)))
    assert "must have 3 dimensions" in refuse(change(pos_embed=torch.zeros(16, 32)))
    assert "--sample_size" in refuse(change(pos_embed=torch.zeros(1, 15, 32)))
    assert "16 positions" in refuse(repa(), "--sample_size", 8, 16)
    assert "projectors.0 takes tokens of width 16" in refuse(random_state(depth=1) | random_projector("mlp", dim=16))
    assert "projectors.0 has 2.weight" in refuse(change(projectors__0__2__weight=torch.zeros(5, 24)))
    prefix = "projectors.0.projection_layer"
    even = {f"{prefix}.weight": torch.zeros(16, 32, 2, 2), f"{prefix}.bias": torch.zeros(16)}
    assert "odd" in refuse(random_state(depth=1) | even)
    state = reg()
    state["pos_embed"] = state["pos_embed"] + 1
    assert "first row of pos_embed" in refuse(state)
    assert "t_embedder.mlp.0.weight" in refuse(change(t_embedder__mlp__0__weight=torch.zeros(32, 128)))


def test_values_that_are_not_finite(refuse):
    broken = repa()
    broken["blocks.0.mlp.fc1.bias"][3] = float("nan")
    assert "blocks.0.mlp.fc1.bias" in refuse(broken)
    broken = repa()
    broken["projectors.0.4.bias"][0] = float("inf")
    assert "projectors.0.4.bias" in refuse(broken)
    large = repa()
    large["blocks.0.mlp.fc1.bias"][3] = 1e6
    assert "choose another --dtype" in refuse(large, "--dtype", "float16")


def test_models_that_cannot_be_converted(refuse):
    def args(**entries: Any) -> dict[str, Any]:
        return {"ema": random_state(depth=1, sigma=True), "args": argparse.Namespace(**entries)}

    assert "VP path" in refuse(args(path_type="VP", prediction="velocity"))
    assert "score" in refuse(args(path_type="Linear", prediction="score"))
    assert "noise" in refuse(args(path_type="GVP", prediction="noise"))
    assert "'x'" in refuse(args(path_type="linear", prediction="x"))
    assert "'spiral'" in refuse(args(path_type="spiral"))


def test_formats_that_are_unclear_or_wrong(refuse):
    assert "--format sit or --format repa" in refuse(random_state(depth=1))
    assert "--format is sit" in refuse(repa(), "--format", "sit")
    assert "sigma" in refuse(random_state(depth=1, sigma=True), "--format", "repa")
    assert "--format is reg" in refuse(repa(), "--format", "reg")
    assert "class token" in refuse(reg(), "--format", "repa")
    run = {"ema": random_state(depth=1), "args": argparse.Namespace(enc_type="dinov2-vit-b")}
    assert "repa's trainer" in refuse(run, "--format", "sit")
    run = {"ema": random_state(depth=1), "args": argparse.Namespace(path_type="GVP", prediction="velocity")}
    assert "say cosine" in refuse(run, "--path_type", "linear")


def test_options_that_do_not_fit(refuse, tmp_path: Path):
    assert "--num_attention_heads" in refuse(repa(), "--num_attention_heads", 5)
    assert "must be 2" in refuse(repa(head_dim=16), "--num_attention_heads", 4)
    assert "--num_classes is 7" in refuse(repa(), "--num_classes", 7)
    assert "--projector_names gives 2" in refuse(repa(), "--projector_names", "a", "b")
    assert "'../x'" in refuse(repa(), "--projector_names", "../x")
    assert "names 1000 classes" in refuse(repa(), "--id2label", "imagenet")
    assert "cannot be read" in refuse(repa(), "--id2label", tmp_path / "absent.json")
    (tmp_path / "names.json").write_text(json.dumps({"a": "cat"}))
    assert "list of names" in refuse(repa(), "--id2label", tmp_path / "names.json")
    assert "--hub_model_id needs --push_to_hub" in refuse(repa(), "--hub_model_id", "me/x")


def test_heads_that_nothing_shows(convert, tmp_path: Path):
    torch.save(repa(), tmp_path / "a.pt")
    with pytest.raises(ConfigurationError, match="width 32 .* --num_attention_heads"):
        convert("--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "out")


def test_autoencoders_that_do_not_fit(refuse, tmp_path: Path):
    message = refuse(repa(channels=16))
    assert "4 latent channels" in message and "has 16" in message and "--vae" in message
    assert "--vae" in refuse(repa(), "--vae", tmp_path / "absent") and "latents.vae" not in refuse(
        repa(), "--vae", tmp_path / "absent"
    )
    assert "3 latent channels" in refuse(repa(), "--vae", "pixels")


def test_autoencoder_is_needed(tmp_path: Path):
    torch.save(repa(), tmp_path / "a.pt")
    with pytest.raises(ConfigurationError, match="set `vae`"):
        convert_module.convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_folders_that_are_taken(convert, tmp_path: Path, tree, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.pt").write_bytes(saved(repa()))
    (tmp_path / "b.pt").write_bytes(saved(repa()))
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    before = tree(tmp_path)

    def refused(checkpoint: str, folder: str, *options: str) -> str:
        with pytest.raises(ConfigurationError) as caught:
            convert(
                "--checkpoint", tmp_path / checkpoint, "--output_dir", tmp_path / folder, "--num_attention_heads", 4,
                *options,
            )  # fmt: skip
        assert tree(tmp_path) == before
        return str(caught.value)

    assert "holds what is read" in refused("out/a.pt", "out", "--overwrite")
    assert "holds what is read" in refused("b.pt", "b.pt")
    assert "is a file" in refused("b.pt", "file")
    assert "not empty" in refused("b.pt", "other")
    assert "holds no pipeline" in refused("b.pt", "other", "--overwrite")
    monkeypatch.chdir(tmp_path / "other")
    assert "current folder" in refused("b.pt", "other", "--overwrite")


def test_overwrite_replaces_the_whole_pipeline(convert, tmp_path: Path):
    torch.save(repa(), tmp_path / "a.pt")
    torch.save(random_state(depth=2), tmp_path / "b.pt")
    options = ("--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    convert("--checkpoint", tmp_path / "a.pt", *options)
    assert (tmp_path / "out/projectors").is_dir()
    convert("--checkpoint", tmp_path / "b.pt", "--format", "repa", *options, "--overwrite")
    assert not (tmp_path / "out/projectors").exists()
    assert json.loads((tmp_path / "out/transformer/config.json").read_text())["num_layers"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt", "out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(
    convert, tmp_path: Path, tree, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    torch.save(repa(), tmp_path / "a.pt")
    options = ("--checkpoint", tmp_path / "a.pt", "--num_attention_heads", 4)
    convert(*options, "--output_dir", tmp_path / "out")
    before = tree(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    # The card is written last, when everything else is in the temporary folder.
    monkeypatch.setattr(convert_module, "write_model_card", fail)
    expected = ConfigurationError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(*options, "--output_dir", tmp_path / "deep" / "new")
    with pytest.raises(expected):
        convert(*options, "--output_dir", tmp_path / "out", "--overwrite")
    assert tree(tmp_path) == before


def test_a_folder_that_may_not_be_written_to(convert, tmp_path: Path):
    torch.save(repa(), tmp_path / "a.pt")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        convert(
            "--checkpoint", tmp_path / "a.pt", "--output_dir", tmp_path / "file" / "out", "--num_attention_heads", 4
        )
