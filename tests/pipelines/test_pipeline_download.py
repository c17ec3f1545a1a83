"""Which files of a repository a pipeline takes."""

import pytest

from diffusers_srepa.pipelines.hub import SiTPipeline, select_pipeline_files


INDEX = {
    "_class_name": "SiTPipeline",
    "_diffusers_version": "0.42.1",
    "guidance_channels": None,
    "id2label": {"0": "tench"},
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers_srepa.models.transformer_sit", "SiTTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
ALWAYS = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
}
OTHER = {
    ".gitattributes",
    "README.md",
    "config.json",
    "config.yaml",
    "diffusion_pytorch_model.safetensors",
    "checkpoint-10/transformer/diffusion_pytorch_model.safetensors",
    "projectors/default/config.json",
    "projectors/default/diffusion_pytorch_model.safetensors",
    "transformer/old/diffusion_pytorch_model.safetensors",
    "transformer/optimizer.bin",
    "transformer/training_args.pt",
    "transformer/notes.txt",
}
PLAIN = {"transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
PICKLED = {"transformer/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"}
EMA = {"transformer/diffusion_pytorch_model.ema.safetensors"}
SHARDS = {
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
}
SHARD_INDEX = {"transformer/diffusion_pytorch_model.safetensors.index.json"}
EMA_SHARDS = {
    "transformer/diffusion_pytorch_model.ema-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.ema-00002-of-00002.safetensors",
}


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        (PLAIN, {}, PLAIN),
        (PLAIN | EMA, {}, PLAIN),
        (PLAIN | EMA, {"variant": "ema"}, EMA | {"vae/diffusion_pytorch_model.safetensors"}),
        (PLAIN | PICKLED, {}, PLAIN),
        (PLAIN | PICKLED, {"use_safetensors": True}, PLAIN),
        (PLAIN | PICKLED, {"use_safetensors": False}, PICKLED),
        (PICKLED, {}, PICKLED),
        (PICKLED, {"use_safetensors": True}, set()),
        (SHARDS | SHARD_INDEX | EMA, {}, SHARDS | SHARD_INDEX),
        (SHARDS | SHARD_INDEX | EMA_SHARDS, {"variant": "ema"}, EMA_SHARDS | SHARD_INDEX),
        (PLAIN, {"passed_components": ["vae"]}, {"transformer/diffusion_pytorch_model.safetensors"}),
    ],
)
def test_weights(weights: set[str], options: dict, expected: set[str]) -> None:
    selected = select_pipeline_files(ALWAYS | OTHER | weights, INDEX, **options)
    always = ALWAYS - {f"{name}/config.json" for name in options.get("passed_components", [])}
    assert set(selected) == always | expected
    assert len(selected) == len(set(selected))


def test_missing_variant() -> None:
    with pytest.raises(ValueError, match="no weights of `variant` 'fp16'.*or choose one of ema"):
        select_pipeline_files(ALWAYS | PLAIN | EMA, INDEX, variant="fp16")
    with pytest.raises(ValueError, match="no weights of `variant` 'fp16': leave it out for the default weights."):
        select_pipeline_files(ALWAYS | PLAIN, INDEX, variant="fp16")


def test_components_without_files() -> None:
    index = {**INDEX, "vae": [None, None]}
    files = ALWAYS | PLAIN
    assert set(select_pipeline_files(files, index)) == {name for name in files if not name.startswith("vae/")}


def test_code_that_a_repository_carries() -> None:
    index = {
        **INDEX,
        "_class_name": ["pipeline_sit", "SiTPipeline"],
        "transformer": ["transformer_sit", "SiTTransformer2DModel"],
    }
    code = {"pipeline_sit.py", "transformer/transformer_sit.py"}
    assert set(select_pipeline_files(ALWAYS | PLAIN | code | {"train.py"}, index)) == ALWAYS | PLAIN | code


def test_offline_and_not_cached(tmp_path) -> None:
    with pytest.raises(OSError, match="'me/nothing' is not in the cache and `local_files_only` is set"):
        SiTPipeline.from_pretrained("me/nothing", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(OSError, match="'me/nothing' is not in the cache and the Hub cannot be reached"):
        SiTPipeline.from_pretrained("me/nothing", cache_dir=tmp_path)
