"""Datasets and teachers by id: the server serves `datasets` and `transformers` as the Hub does."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from diffusers import AutoencoderKL
from huggingface_hub import HfApi
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoModel, BitImageProcessor, Dinov2Config, Dinov2Model

from diffusers_srepa.data.datasets import load_image_dataset
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.teachers.auto_teacher import Teacher
from tests.hub.server import HubServer


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (value, value, value)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def digits() -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=["even", "odd"])})
    rows = {"image": [{"bytes": png(20 * index), "path": None} for index in range(6)], "label": [0, 1] * 3}
    return Dataset.from_dict(rows, features=features)


@pytest.fixture
def teacher() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    return Dinov2Model(config).eval()


def test_dataset_round_trip(hub: HubServer, digits: Dataset) -> None:
    digits.push_to_hub("tester/digits")
    repository = hub.dataset("tester/digits")
    assert "README.md" in repository.resolve("main").files
    assert len(hub.requests("POST", "/commit/")) == 1
    loaded = load_dataset("tester/digits", split="train")
    assert loaded.features["label"].names == ["even", "odd"]
    assert [np.asarray(row["image"])[0, 0, 0] for row in loaded] == [0, 20, 40, 60, 80, 100]
    assert loaded["label"] == [0, 1] * 3
    assert {entry.token for entry in hub.requests(origin="cdn")} == {None}


def test_dataset_stream(hub: HubServer, digits: Dataset) -> None:
    digits.push_to_hub("tester/digits")
    rows = list(load_dataset("tester/digits", split="train", streaming=True))
    assert [row["label"] for row in rows] == [0, 1] * 3
    assert any("range" in entry.headers for entry in hub.requests("GET", origin="cdn"))


def test_dataset_of_images_in_class_folders_by_revision(hub: HubServer) -> None:
    files = {f"train/{name}/{index}.png": png(index) for name in ("cat", "dog") for index in range(2)}
    hub.add_repository("tester/pets", files, kind="datasets").add_files({"train/eel/0.png": png(0)})
    parent = hub.dataset("tester/pets").resolve("main").parent
    loaded = load_dataset("tester/pets", split="train")
    assert loaded.features["label"].names == ["cat", "dog", "eel"] and len(loaded) == 5
    earlier = load_dataset("tester/pets", split="train", revision=parent)
    assert earlier.features["label"].names == ["cat", "dog"] and len(earlier) == 4


def test_missing_dataset(hub: HubServer) -> None:
    with pytest.raises(Exception, match="tester/nothing"):
        load_dataset("tester/nothing", split="train")


def test_teacher_round_trip(hub: HubServer, teacher: Dinov2Model) -> None:
    teacher.push_to_hub("tester/tiny-dino")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).push_to_hub(
        "tester/tiny-dino"
    )
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher(pixels).last_hidden_state
        loaded = AutoModel.from_pretrained("tester/tiny-dino").eval()
        assert isinstance(loaded, Dinov2Model)
        assert torch.equal(loaded(pixels).last_hidden_state, expected)
    assert AutoImageProcessor.from_pretrained("tester/tiny-dino").crop_size["height"] == 28
    assert {entry.token for entry in hub.requests(origin="cdn")} == {None}


def test_our_teacher_by_id(hub: HubServer, teacher: Dinov2Model) -> None:
    teacher.push_to_hub("tester/tiny-dino")
    HfApi().create_tag("tester/tiny-dino", tag="v1")
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    loaded = Teacher.from_pretrained("tester/tiny-dino", grid=(2, 2), revision="v1")
    assert loaded(images).patch_tokens.shape == (1, 4, 16)
    for repo_id, revision in (("tester/nothing", None), ("tester/tiny-dino", "v2")):
        with pytest.raises(ConfigurationError, match=revision or repo_id):
            Teacher.from_pretrained(repo_id, grid=(2, 2), revision=revision)


def test_our_dataset_and_autoencoder_by_id(hub: HubServer, digits: Dataset) -> None:
    digits.push_to_hub("tester/digits")
    dataset = load_image_dataset("tester/digits", resolution=8)
    assert dataset.id2label == {0: "even", 1: "odd"} and len(dataset) == 6
    assert dataset[1]["pixel_values"].unique().tolist() == [20]
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).push_to_hub("tester/vae")
    latent_space = AutoencoderKLLatents.from_pretrained("tester/vae")
    mean, std = latent_space.encode_moments(torch.rand(1, 3, 8, 8))
    assert mean.shape == std.shape == (1, 4, 8, 8)
