"""Where a teacher is loaded from, and what is said when that fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.teachers.auto_teacher import Teacher


def refused(name: str, **options: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Teacher.from_pretrained(name, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_a_subfolder_with_its_own_processor(
    checkpoint: Callable[[str], str], tmp_path: Path, images: torch.Tensor
) -> None:
    shutil.copytree(checkpoint("dinov2"), tmp_path / "teacher")
    teacher = Teacher.from_pretrained(str(tmp_path), subfolder="teacher")
    expected = Teacher.from_pretrained(checkpoint("dinov2"))
    assert teacher.image_mean == (0.4, 0.5, 0.6)
    assert torch.equal(teacher(images).patch_tokens, expected(images).patch_tokens)
    assert teacher.name_or_path == str(tmp_path) and teacher.model_type == "dinov2"


def test_a_path_object_is_accepted(checkpoint: Callable[[str], str]) -> None:
    assert Teacher.from_pretrained(Path(checkpoint("dinov2")), cache_dir=Path("/tmp")).grid == (4, 4)


def test_a_repository_that_cannot_be_found(tmp_path: Path) -> None:
    message = refused("nobody/no-such-teacher", local_files_only=True, cache_dir=str(tmp_path))
    assert "'nobody/no-such-teacher'" in message and "local_files_only" in message
    assert "neither a local folder" in refused("no/such/folder")


def test_a_folder_without_a_usable_config(tmp_path: Path) -> None:
    assert "no config.json that names a model_type" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert "no config.json that names a model_type" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    assert "no_such_type" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "not a valid JSON file" in refused(str(tmp_path))


def test_code_that_comes_with_a_repository_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}})
    )
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "custom code" in refused(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_missing_truncated_and_incomplete_weights(checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("dinov2"), folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("encoder.layer.1.norm1.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "norm1.weight" in refused(str(folder)) and "random weights" in refused(str(folder))
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "cannot be loaded" in refused(str(folder))
    weights.unlink()
    assert "cannot be loaded" in refused(str(folder))


def test_weights_of_another_size_are_refused(checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("dinov2"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    assert "cannot be loaded" in refused(str(folder))


def test_a_missing_mask_token_is_no_obstacle(checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("dinov2"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("embeddings.mask_token")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    Teacher.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"patch_size": [8, 4]}, "must be square"), ({"num_channels": 1}, "takes 1 channels")],
)
def test_towers_for_other_images_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    values = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = transformers.ViTConfig(**(values | change))
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert message in refused(str(tmp_path))


def test_the_verbosity_of_transformers_is_restored(checkpoint: Callable[[str], str]) -> None:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        Teacher.from_pretrained(checkpoint("clip"))
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity(before)


def test_checkpoints_in_half_precision_are_loaded_in_float32(checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    transformers.Dinov2Model.from_pretrained(checkpoint("dinov2"), dtype=torch.float16).save_pretrained(tmp_path)
    assert Teacher.from_pretrained(str(tmp_path)).dtype == torch.float32


def test_importing_it_needs_no_torchvision() -> None:
    code = "import sys; sys.modules['torchvision'] = None; import diffusers_srepa.teachers.auto_teacher"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
