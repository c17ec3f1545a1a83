"""Transformers and projectors of pipelines and of checkpoints of both formats: always the averaged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.models.loading import (
    find_folder,
    has_raw_weights,
    load_transformer,
    projector_names,
    read_transformer_config,
    read_weights,
)
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from tests.helpers.checkpoint_formats import FORMAT_1, MODULES, saved_weights, write_format_2


@pytest.fixture(params=[1, 2])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FORMAT_1 if request.param == 1 else write_format_2(tmp_path / "checkpoint-2")


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_transformer_has_the_averaged_weights(checkpoint: Path) -> None:
    ema, raw = saved_weights("transformer")
    assert not torch.equal(ema["proj_out.weight"], raw["proj_out.weight"])
    transformer = load_transformer(checkpoint)
    assert isinstance(transformer, SiTTransformer2DModel) and not transformer.training
    check_equal(transformer.state_dict(), ema)
    assert read_transformer_config(str(checkpoint))["num_layers"] == 2


@pytest.mark.parametrize("module", MODULES)
def test_averaged_and_trained_weights_of_every_module(checkpoint: Path, module: str) -> None:
    ema, raw = saved_weights(module)
    assert has_raw_weights(checkpoint) and projector_names(checkpoint) == ["default"]
    check_equal(read_weights(checkpoint, module), ema)
    check_equal(read_weights(checkpoint, module, raw=True), raw)


def test_a_pipeline_is_as_it_is_saved() -> None:
    pipeline = FORMAT_1.parent
    assert find_folder(pipeline) == pipeline and not has_raw_weights(pipeline)
    check_equal(load_transformer(pipeline).state_dict(), read_weights(pipeline, "transformer"))


def test_another_native_size_changes_the_positions_alone(checkpoint: Path) -> None:
    small, large = load_transformer(checkpoint), load_transformer(checkpoint, sample_size=12)
    assert large.config.sample_size == 12 and large.pos_embed.shape == (1, 36, 8) and not large.training
    for name, value in small.named_parameters():
        assert torch.equal(large.get_parameter(name), value), name


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(FORMAT_1, folder)

    def refused(source: Path | str) -> str:
        with pytest.raises(ConfigurationError) as caught:
            load_transformer(source)
        assert "\n" not in str(caught.value) and "`source`" in str(caught.value)
        return str(caught.value)

    assert "no/such/run" in refused("no/such/run")
    assert "is a file" in refused(folder / "state.json")
    assert "no folder transformer" in refused(folder / "projectors")
    (folder / "ema.safetensors").rename(folder / "other")
    assert "cannot be loaded" in refused(folder)
    (folder / "state.json").write_text('{"format": 3}')
    assert "format 3" in refused(folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet2DModel"}))
    assert "UNet2DModel" in refused(folder)
    config.write_text("{")
    assert "no valid JSON" in refused(folder)
