"""Checkpoints: complete or absent, checked when read, free of pickles."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.projectors import MLPProjector
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.files import remove_incomplete
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.schedulers.registry import build_scheduler
from diffusers_srepa.training.checkpoint import (
    RunState,
    load_raw_weights,
    load_training_state,
    optimizer_state,
    read_state,
    save_checkpoint,
    save_tensors,
)
from diffusers_srepa.training.optimizers import EMA
from diffusers_srepa.training.run_folder import (
    CheckpointError,
    find_checkpoint,
    find_damage,
    prune_checkpoints,
)


Parts = tuple[AlignedDenoiser, EMA, torch.optim.AdamW]


def _parts(num_layers: int = 2, seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    transformer = SiTTransformer2DModel(
        sample_size=4, num_layers=num_layers, num_attention_heads=2, attention_head_dim=8, num_classes=3
    )
    student = AlignedDenoiser(transformer, "transformer_blocks.0", MLPProjector(16, 8, hidden_dim=8))
    return student, EMA({"student": student}, 0.9), torch.optim.AdamW(student.parameters(), lr=1e-2)


def _train(parts: Parts, steps: int, seed: int = 5) -> None:
    student, average, optimizer = parts
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        latents = torch.randn(2, 4, 4, 4, generator=generator)
        labels, drop = torch.tensor([0, 2]), torch.tensor([False, True])
        velocity, tokens = student(latents, torch.tensor([100.0, 700.0]), class_labels=labels, class_drop_mask=drop)
        loss = (velocity - latents).square().mean() + tokens["default", "default"].tokens.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()


def _state(step: int) -> RunState:
    return RunState(step=step, seed=0, global_batch_size=2, num_processes=1, dataset_fingerprint="f")


def _save(folder: Path, parts: Parts, step: int) -> Path:
    student, average, optimizer = parts
    modules = {"student": student}
    raw = {f"student.{name}": value for name, value in student.state_dict().items()}
    with average.applied():
        return save_checkpoint(
            folder,
            _state(step),
            raw=raw,
            averaged=modules,
            optimizers={"student": optimizer_state(optimizer, modules)},
            pipeline=SiTPipeline(student.transformer, None, build_scheduler("euler")),
            autoencoder=None,
            config_text="seed: 0\n",
        )


def _load(folder: Path, parts: Parts) -> RunState:
    student, average, optimizer = parts
    load_raw_weights(folder, {"student": student})
    load_training_state(folder, {"student": student}, average, {"student": optimizer})
    return read_state(folder)


@pytest.fixture(autouse=True)
def _logging_state() -> None:
    PartialState(cpu=True)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = _parts()
    _train(whole, 3)
    folder = _save(tmp_path, whole, 3)
    _train(whole, 2, seed=6)
    restored = _parts(seed=99)
    state = _load(folder, restored)
    assert state == _state(3)
    _train(restored, 2, seed=6)
    for (name, one), other in zip(whole[0].named_parameters(), restored[0].parameters(), strict=True):
        assert torch.equal(one, other), name
    for name, one in whole[1].averages.items():
        assert torch.equal(one, restored[1].averages[name]), name


def test_weights_load_as_ordinary_models_and_nothing_is_pickled(tmp_path: Path) -> None:
    parts = _parts()
    _train(parts, 1)
    folder = _save(tmp_path, parts, 1)
    loaded = SiTTransformer2DModel.from_pretrained(folder / "transformer")
    average = parts[1].averages["student.transformer.patch_embed.proj.weight"]
    assert torch.equal(loaded.patch_embed.proj.weight, average)
    assert not torch.equal(average, parts[0].transformer.patch_embed.proj.weight)
    assert torch.equal(SiTPipeline.from_pretrained(folder).transformer.patch_embed.proj.weight, average)
    assert MLPProjector.from_pretrained(folder / "projectors" / "default").config.out_dim == 8
    suffixes = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors", ".yaml"}


def test_the_newest_intact_checkpoint_is_found_and_damage_is_named(tmp_path: Path, caplog) -> None:
    parts = _parts()
    _train(parts, 1)
    assert find_checkpoint(tmp_path, "latest") is None
    folders = [_save(tmp_path, parts, step) for step in (5, 10, 15, 20)]
    assert find_checkpoint(tmp_path, "latest") == folders[3]
    weights = folders[3] / "raw.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (folders[2] / "state.json").write_text("{}")
    (folders[1] / "optimizer_student.safetensors").unlink()
    assert find_damage(folders[3]) == "raw.safetensors has other content than was written"
    assert "bytes instead of" in str(find_damage(folders[2]))
    assert find_damage(folders[1]) == "optimizer_student.safetensors is missing"
    assert find_checkpoint(tmp_path, "latest") == folders[0]
    assert "checkpoint-20 is damaged" in caplog.text
    with pytest.raises(ConfigurationError, match="damaged"):
        find_checkpoint(tmp_path, "checkpoint-20")
    (folders[0] / "manifest.json").unlink()
    with pytest.raises(ConfigurationError, match="all 4 checkpoints"):
        find_checkpoint(tmp_path, "latest")


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"state.json": {}}', '{"state.json": null}', "\\xff{"])
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, content: str) -> None:
    folder = _save(tmp_path, _parts(), 5)
    (folder / "manifest.json").write_text(content)
    assert find_damage(folder) in ("manifest.json is missing or unreadable", "state.json is missing")


def test_a_file_that_the_disk_does_not_give_back_is_damage(tmp_path: Path) -> None:
    folder = _save(tmp_path, _parts(), 5)
    (folder / "config.yaml").unlink()
    # A file whose first byte is an input/output error.
    (folder / "config.yaml").symlink_to("/proc/self/mem")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config.yaml"]["size"] = 0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert find_damage(folder) == "config.yaml cannot be read: Input/output error"


def test_fields_of_a_newer_version_are_one_sentence(tmp_path: Path) -> None:
    folder = _save(tmp_path, _parts(), 5)
    document = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**document, "curriculum": 3}))
    with pytest.raises(ConfigurationError, match="state.json of .* holds curriculum, which this version") as error:
        read_state(folder)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_goes_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _parts()
    for step in (5, 10):
        _save(tmp_path, parts, step)

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (folder / "manifest.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        prune_checkpoints(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_checkpoint_can_be_named_below_the_run_or_by_path(tmp_path: Path) -> None:
    parts = _parts()
    _train(parts, 1)
    folder = _save(tmp_path, parts, 5)
    assert find_checkpoint(tmp_path, "checkpoint-5") == folder
    assert find_checkpoint(tmp_path / "elsewhere", str(folder)) == folder
    with pytest.raises(ConfigurationError, match="there is no checkpoint checkpoint-6"):
        find_checkpoint(tmp_path, "checkpoint-6")


def test_another_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    parts = _parts()
    _train(parts, 1)
    folder = _save(tmp_path, parts, 5)
    with pytest.raises(ConfigurationError, match="does not fit the model") as error:
        _load(folder, _parts(num_layers=3))
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_no_half_checkpoint_and_keeps_the_old_ones(tmp_path: Path) -> None:
    parts = _parts()
    _train(parts, 1)
    good = _save(tmp_path, parts, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="the last complete checkpoint is checkpoint-5: make room") as error:
            _save(tmp_path, parts, 10)
        assert "\n" not in str(error.value) and "checkpoint-10 could not be written" in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert find_damage(good) is None


def test_weights_that_share_memory_are_written_each_for_itself(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    save_tensors({"one": weight, "same": weight, "part": weight[:3]}, tmp_path / "tied.safetensors")
    tied = load_file(tmp_path / "tied.safetensors")
    assert (
        torch.equal(tied["one"], weight)
        and torch.equal(tied["same"], weight)
        and torch.equal(tied["part"], weight[:3])
    )


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    parts = _parts()
    _train(parts, 1)
    _save(tmp_path, parts, 5)
    _train(parts, 1)
    folder = _save(tmp_path, parts, 5)
    assert find_damage(folder) is None and [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    loaded = SiTTransformer2DModel.from_pretrained(folder / "transformer")
    assert torch.equal(
        loaded.patch_embed.proj.weight, parts[1].averages["student.transformer.patch_embed.proj.weight"]
    )


def test_old_checkpoints_are_pruned_and_remains_removed(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / ".incomplete-checkpoint-200").mkdir()
    prune_checkpoints(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 4
    prune_checkpoints(tmp_path, 2)
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_the_manifest_covers_every_file(tmp_path: Path) -> None:
    parts = _parts()
    _train(parts, 1)
    folder = _save(tmp_path, parts, 5)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert set(json.loads((folder / "manifest.json").read_text())) == files - {"manifest.json"}
