"""Checkpoints and pipelines that versions before format 2 wrote still resume, continue and load.

`tests/fixtures/format_1` was written by such a version: two steps into `checkpoint-2`, two more to the finished
pipeline. Its paths are relative to its own folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusers_srepa import ConfigurationError, SiTPipeline, Trainer, load_training_config


FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "format_1"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture as the working directory, its finished pipeline aside in `finished`."""
    shutil.copytree(FIXTURE, tmp_path / "work")
    work = tmp_path / "work"
    shutil.copytree(work / "run", tmp_path / "finished")
    monkeypatch.chdir(work)
    return work


def resume(*options: str) -> Trainer:
    arguments = ["--config", "run/config.yaml", "--output_dir", "run", "--resume_from_checkpoint", "latest", *options]
    return Trainer(load_training_config(arguments))


def test_a_checkpoint_of_before_resumes_to_the_run_of_before(before: Path, tmp_path: Path) -> None:
    values = [json.loads(line) for line in (before / "run" / "metrics.jsonl").read_text().splitlines()]
    trainer = resume()
    assert trainer.step == 2
    trainer.train()
    for part in ("transformer", "projectors/default"):
        ours, theirs = (load_file(folder / part / WEIGHTS) for folder in (before / "run", tmp_path / "finished"))
        assert ours.keys() == theirs.keys()
        for name in theirs:
            # The moving average is computed in another order of roundings now.
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    records = [json.loads(line) for line in (before / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record, value in zip(records, values, strict=True):
        for name in ("loss", "flow", "alignment/cosine", "alignment/gram_mse", "grad_norm", "lr"):
            assert record[name] == pytest.approx(value[name], rel=1e-5, abs=1e-7), name
    assert json.loads((before / "run" / "checkpoint-4" / "state.json").read_text())["format"] == 2
    # The next resume starts from a checkpoint of the new format.
    resume("--training.max_steps", "5").train()


def test_its_averages_and_its_raw_weights_are_told_apart(before: Path) -> None:
    trainer = resume()
    raw = load_file("run/checkpoint-2/transformer/" + WEIGHTS)
    averages = load_file("run/checkpoint-2/ema.safetensors")
    name = "proj_out.weight"
    assert torch.equal(trainer.modules["student"].transformer.state_dict()[name], raw[name])
    assert torch.equal(trainer.ema.averages[f"student.transformer.{name}"], averages[f"transformer.{name}"])
    assert not torch.equal(raw[name], averages[f"transformer.{name}"])
    trainer.lock.release()


@pytest.mark.parametrize("source", ["run/checkpoint-2", "run"])
def test_training_goes_on_from_its_averaged_weights(before: Path, source: str) -> None:
    options = ["--output_dir", "next", "--model.init_from", source, "--resume_from_checkpoint", "null"]
    trainer = Trainer(load_training_config(["--config", "run/config.yaml", *options]))
    student = trainer.modules["student"].state_dict()
    if source == "run":
        expected = {f"transformer.{name}": value for name, value in load_file(f"run/transformer/{WEIGHTS}").items()}
    else:
        expected = load_file("run/checkpoint-2/ema.safetensors")
        assert any(name.startswith("projectors.default.") for name in expected)
    assert all(torch.equal(student[name], value) for name, value in expected.items())
    trainer.lock.release()


def test_changed_options_are_found_under_their_former_names(before: Path) -> None:
    file = Path("run/checkpoint-2/config.yaml")
    assert "timestep_law: uniform" in file.read_text()
    with pytest.raises(ConfigurationError, match="flow.timestep_sampling was uniform and is lognormal"):
        resume("--flow.timestep_sampling", "lognormal")
    options = yaml.safe_load(file.read_text())
    assert options["flow"]["timestep_law"] == "uniform"


def test_a_pipeline_of_before_loads_and_samples(before: Path) -> None:
    pipeline = SiTPipeline.from_pretrained("run")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["cat", 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(16, 16)] * 2
    with pytest.raises(ConfigurationError, match="older format"):
        SiTPipeline.from_pretrained("run/checkpoint-2")
