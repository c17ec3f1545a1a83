"""`Teacher.from_pretrained` through the real clients: every family by id, and what is asked of the Hub for it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.teachers.auto_teacher import Teacher
from tests.helpers.tiny_teachers import MEAN, STD, build_model, write_processor
from tests.hub.conftest import RunPython
from tests.hub.server import TOKEN, HubServer


WB = ("weight", "bias")
FAMILIES = ("dinov2", "dinov3_vit", "vit_mae", "ijepa", "clip", "siglip", "siglip2")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path) -> Callable[..., str]:
    """`pushed(kind)` is the id of a repository with that checkpoint, its processor and other libraries' files."""

    def push(kind: str, processor: bool = True, private: bool = False) -> str:
        repo_id = f"tester/tiny-{kind.replace('_', '-')}"
        folder = tmp_path / kind
        build_model(kind).save_pretrained(folder)
        if processor:
            write_processor(folder)
        # What old repositories carry beside the safetensors: the same weights for others.
        for twin in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx"):
            (folder / twin).parent.mkdir(exist_ok=True)
            (folder / twin).write_bytes(b"no weights\0")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        api = HfApi()
        api.create_repo(repo_id, private=private)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
        hub.log.clear()
        return repo_id

    return push


def downloads(hub: HubServer) -> set[str]:
    """Paths of the files that were asked for and found."""
    found = [entry.path for entry in hub.requests(path="/resolve/", origin="hub") if entry.status < 400]
    return {re.sub(r".*/resolve/[^/]+/", "", path) for path in found}


def refused(name: str, **options: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Teacher.from_pretrained(name, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and repr(name) in message, message
    return message


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_by_its_id_with_the_files_it_needs_and_no_others(
    kind: str, hub: HubServer, pushed: Callable[..., str], images: torch.Tensor, tmp_path: Path
) -> None:
    teacher = Teacher.from_pretrained(pushed(kind), grid=(6, 6))
    assert teacher.model_type == kind and (teacher.image_mean, teacher.image_std) == (tuple(MEAN), tuple(STD))
    from_disk = Teacher.from_pretrained(tmp_path / kind, grid=(6, 6))
    assert torch.equal(teacher(images).patch_tokens, from_disk(images).patch_tokens)
    assert downloads(hub) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {entry.token for entry in hub.requests(origin="cdn")} == {None}


def test_a_checkpoint_that_was_pushed_by_its_own_class(hub: HubServer, images: torch.Tensor, caplog) -> None:
    model = build_model("dinov2_with_registers")
    model.push_to_hub("tester/registers")
    with caplog.at_level(logging.WARNING):
        teacher = Teacher.from_pretrained("tester/registers", token=TOKEN)
    assert teacher.num_prefix_tokens == 4 and teacher(images).grid == (4, 4)
    assert teacher.image_mean == (0.485, 0.456, 0.406)
    assert "no image processor (preprocessor_config.json) is in 'tester/registers'" in caplog.text


def test_revisions(hub: HubServer, pushed: Callable[..., str], images: torch.Tensor, tmp_path: Path) -> None:
    repo_id = pushed("dinov2")
    HfApi().create_tag(repo_id, tag="v1")
    old_commit = hub.model(repo_id).resolve("main").oid
    before = Teacher.from_pretrained(repo_id)(images).patch_tokens
    model = build_model("dinov2")
    model.layernorm.weight.data.mul_(2)
    model.push_to_hub(repo_id)
    write_processor(tmp_path, image_mean=[0.1, 0.1, 0.1])
    HfApi().upload_file(
        repo_id=repo_id, path_or_fileobj=tmp_path / "preprocessor_config.json", path_in_repo="preprocessor_config.json"
    )
    for revision in ("v1", old_commit):
        old = Teacher.from_pretrained(repo_id, revision=revision)
        assert torch.equal(old(images).patch_tokens, before) and old.image_mean == tuple(MEAN), revision
    new = Teacher.from_pretrained(repo_id)
    assert not torch.allclose(new(images).patch_tokens, before) and new.image_mean == (0.1, 0.1, 0.1)
    assert "has no revision 'v2'" in refused(repo_id, revision="v2")


def test_private_gated_and_missing_repositories_get_one_sentence(
    hub: HubServer, pushed: Callable[..., str], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repo_id = pushed("dinov3_vit", private=True)
    assert "nor a Hub repository that you can see: check `name_or_path` or your token" in refused(repo_id, token=False)
    assert "nor a Hub repository that you can see" in refused("tester/no-such-teacher")
    monkeypatch.delenv("HF_TOKEN")
    teacher = Teacher.from_pretrained(repo_id, token=TOKEN, cache_dir=tmp_path / "cache")
    assert teacher(images).grid == (4, 4)
    gate = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}
    for method in ("HEAD", "GET"):
        hub.fail(method, "/resolve/", status=403, times=100, headers=gate)
    message = refused(repo_id, token=TOKEN, cache_dir=tmp_path / "empty")
    assert "is gated: accept its conditions on its Hub page and pass a token that may read it" in message


def test_once_loaded_it_loads_offline(
    hub: HubServer, pushed: Callable[..., str], images: torch.Tensor, run_python: RunPython
) -> None:
    clip, bare = pushed("clip"), pushed("siglip", processor=False)
    assert "neither a local folder nor in the cache" in refused(clip, local_files_only=True)
    expected = Teacher.from_pretrained(clip)(images).patch_tokens
    Teacher.from_pretrained(bare)
    hub.log.clear()
    assert torch.equal(Teacher.from_pretrained(clip, local_files_only=True)(images).patch_tokens, expected)
    code = (
        "from diffusers_srepa import Teacher\n"
        f"assert Teacher.from_pretrained({clip!r}).image_mean == {tuple(MEAN)}\n"
        f"assert Teacher.from_pretrained({bare!r}).image_mean == (0.5, 0.5, 0.5)\n"
        "try:\n    Teacher.from_pretrained('tester/never-loaded')\n"
        "except ValueError as error:\n    assert 'neither a local folder nor in the cache' in str(error), error\n"
        "else:\n    raise SystemExit('loaded what is not there')\n"
    )
    result = run_python(code, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert hub.log == []


def test_a_processor_that_cannot_be_fetched_is_no_missing_processor(
    hub: HubServer, pushed: Callable[..., str]
) -> None:
    """Other numbers than the repository's would silently make another teacher of it."""
    repo_id = pushed("siglip")
    for method in ("HEAD", "GET"):
        hub.fail(method, "/resolve/.*/preprocessor_config", status=403, times=100)
    assert "cannot be fetched from the Hub now" in refused(repo_id)


def test_code_in_a_repository_is_never_run(
    hub: HubServer, pushed: Callable[..., str], images: torch.Tensor, tmp_path: Path
) -> None:
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n"
    auto_map = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model", "AutoImageProcessor": "theirs.Processor"}
    known = pushed("dinov2")
    config = json.loads((tmp_path / "dinov2" / "config.json").read_text())
    files = {"config.json": json.dumps({**config, "auto_map": auto_map}), "theirs.py": trap}
    processor = json.loads((tmp_path / "dinov2" / "preprocessor_config.json").read_text())
    hub.model(known).add_files({**files, "preprocessor_config.json": json.dumps({**processor, "auto_map": auto_map})})
    hub.log.clear()
    teacher = Teacher.from_pretrained(known)
    assert teacher(images).grid == (4, 4) and teacher.image_mean == tuple(MEAN)

    files["config.json"] = json.dumps({"model_type": "theirs", "patch_size": 8, "auto_map": auto_map})
    hub.add_repository("tester/theirs", files)
    assert "cannot be loaded" in refused("tester/theirs")
    assert not (tmp_path / "ran").exists() and "theirs.py" not in downloads(hub)


def timm_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 17, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
        "blocks.0.attn.qkv.weight": (1152, 384),
        "blocks.0.attn.qkv.bias": (1152,),
        "blocks.0.attn.proj.weight": (384, 384),
        "blocks.0.attn.proj.bias": (384,),
        "blocks.0.mlp.fc1.weight": (64, 384),
        "blocks.0.mlp.fc1.bias": (64,),
        "blocks.0.mlp.fc2.weight": (384, 64),
        "blocks.0.mlp.fc2.bias": (384,),
    }
    shapes |= {f"{norm}.{kind}": (384,) for norm in ("norm", "blocks.0.norm1", "blocks.0.norm2") for kind in WB}
    return {name: 0.1 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("config", [None, "{}", '{"width": 384}'])
def test_moco_v3_weights_in_a_repository(
    config: str | None, hub: HubServer, images: torch.Tensor, tmp_path: Path
) -> None:
    save_file(timm_weights(), tmp_path / "model.safetensors")
    torch.save({"state_dict": timm_weights()}, tmp_path / "vit-s.pth.tar")
    files: dict[str, bytes | str] = {
        name: (tmp_path / name).read_bytes() for name in ("model.safetensors", "vit-s.pth.tar")
    }
    hub.add_repository("tester/moco", files if config is None else {**files, "config.json": config})
    teacher = Teacher.from_pretrained("tester/moco")
    assert teacher.model_type == "moco_v3" and teacher.feature_dim == 384 and teacher.image_mean[0] == 0.485
    assert "vit-s.pth.tar" not in downloads(hub)
    by_name = Teacher.from_pretrained("tester/moco", weight_name="vit-s.pth.tar")
    assert torch.equal(teacher(images).patch_tokens, by_name(images).patch_tokens)
    hub.log.clear()
    offline = Teacher.from_pretrained("tester/moco", local_files_only=True)
    assert torch.equal(teacher(images).patch_tokens, offline(images).patch_tokens) and hub.log == []
    assert "has no file 'other.pth'" in refused("tester/moco", weight_name="other.pth")
