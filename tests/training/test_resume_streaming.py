"""A run on a stream that is stopped and resumed is the run that never stopped, bit for bit."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
from datasets import ClassLabel
from PIL import Image

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.data import streaming
from diffusers_srepa.errors import ConfigurationError, DataError
from diffusers_srepa.training.run_folder import write_manifest
from diffusers_srepa.training.trainer import Trainer
from tests.helpers.tiny_images import image_table, png


NAMES = ClassLabel(names=["cat", "dog", "newt"])
# 26 rows in steps of 8: an epoch ends inside the fourth step, the seventh and the tenth.
ROWS = 26
UNREADABLE = {3: b"garbage", 11: None, 12: png(12)[:150], 25: b""}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parquet files of unequal length, with unreadable images and a row without label."""
    folder = tmp_path_factory.mktemp("shards")
    images = [UNREADABLE.get(row, png(row)) for row in range(ROWS)]
    labels = [row % 3 if row != 17 else None for row in range(ROWS)]
    for shard, (start, stop) in enumerate([(0, 5), (5, 13), (13, 20), (20, ROWS)]):
        table = image_table(images[start:stop], labels[start:stop], NAMES)
        table.to_parquet(str(folder / f"train-{shard}.parquet"))
    return folder


def _trainer(assets: Path, shards: Path, output_dir: Path, *options: str) -> Trainer:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir)]
    arguments += ["--data.dataset", str(shards), "--data.streaming", "--data.horizontal_flip", "true"]
    arguments += ["--data.cache_dir", str(output_dir.parent / "cache")]
    trainer = Trainer(load_training_config([*arguments, *options]))
    trainer.dataset.block_rows = 5
    return trainer


def _digests(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint holds, but for the configuration, which tells how far the run was to go."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    left_out = ("config.yaml", "manifest.json")
    return {
        str(file.relative_to(checkpoint)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.parent != checkpoint or file.name not in left_out
    }


def _losses(folder: Path) -> list[tuple[float, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record["replaced_images"]) for record in records]


@pytest.mark.parametrize("num_workers", ["0", "1"])
@pytest.mark.parametrize("stop", ["2", "5"], ids=["first epoch", "second epoch"])
def test_stopping_and_resuming_changes_nothing(
    assets: Path, shards: Path, tmp_path: Path, num_workers: str, stop: str
) -> None:
    options = ["--data.num_workers", num_workers, "--checkpoints.every", "100"]
    _trainer(assets, shards, tmp_path / "whole", *options, "--training.max_steps", "9").train()
    _trainer(assets, shards, tmp_path / "halves", *options, "--training.max_steps", stop).train()
    again = ["--training.max_steps", "9", "--resume_from_checkpoint", "latest"]
    resumed = _trainer(assets, shards, tmp_path / "halves", *options, *again)
    assert resumed.step == int(stop)
    resumed.train()
    whole = _digests(tmp_path / "whole" / "checkpoint-9")
    assert {"raw.safetensors", "optimizer_student.safetensors", "state.json"} <= whole.keys()
    assert whole == _digests(tmp_path / "halves" / "checkpoint-9")
    assert _losses(tmp_path / "whole") == _losses(tmp_path / "halves")
    assert _losses(tmp_path / "whole")[-1][1] > 3


def test_loader_processes_and_micro_batches_change_nothing_on_the_way(
    assets: Path, shards: Path, tmp_path: Path
) -> None:
    _trainer(assets, shards, tmp_path / "whole", "--training.max_steps", "6").train()
    _trainer(assets, shards, tmp_path / "halves", "--training.max_steps", "4").train()
    again = ["--training.max_steps", "6", "--resume_from_checkpoint", "latest", "--data.num_workers", "1"]
    _trainer(assets, shards, tmp_path / "halves", *again, "--training.micro_batch_size", "2").train()
    whole, halves = _losses(tmp_path / "whole"), _losses(tmp_path / "halves")
    assert [loss for loss, _ in halves] == pytest.approx([loss for loss, _ in whole], rel=1e-4)
    assert [count for _, count in halves] == [count for _, count in whole]


def test_a_resume_decodes_only_what_it_trains_on(
    assets: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    read_crop = streaming.read_crop

    def counted(*arguments):
        decoded.append(arguments)
        return read_crop(*arguments)

    _trainer(assets, shards, tmp_path, "--training.max_steps", "6").train()
    monkeypatch.setattr(streaming, "read_crop", counted)
    again = ["--training.max_steps", "7", "--resume_from_checkpoint", "latest"]
    resumed = _trainer(assets, shards, tmp_path, *again)
    before = resumed.replaced_images
    resumed.train()
    # Rows without a label are passed over before their image is looked at.
    passed_over = resumed.replaced_images - before
    assert 8 <= len(decoded) <= 8 + passed_over


def _written_by(checkpoint: Path, processes: int) -> None:
    """Make a checkpoint say that so many processes wrote it."""
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"num_processes": processes}))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


def test_another_number_of_processes_is_refused_unless_allowed(assets: Path, shards: Path, tmp_path: Path) -> None:
    _trainer(assets, shards, tmp_path, "--training.max_steps", "2").train()
    _written_by(tmp_path / "checkpoint-2", 2)
    again = ["--training.max_steps", "3", "--resume_from_checkpoint", "latest"]
    with pytest.raises(ConfigurationError, match=r"2 process.*has 1, .*stream.*resume_with_changes") as error:
        _trainer(assets, shards, tmp_path, *again)
    assert "\n" not in str(error.value)
    _trainer(assets, shards, tmp_path, *again, "--resume_with_changes").train()
    assert (tmp_path / "checkpoint-3").is_dir()


def test_without_a_stream_the_number_of_processes_may_change(assets: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(tmp_path)]
    Trainer(load_training_config([*arguments, "--training.max_steps", "2"])).train()
    _written_by(tmp_path / "checkpoint-2", 2)
    again = ["--training.max_steps", "3", "--resume_from_checkpoint", "latest"]
    assert Trainer(load_training_config([*arguments, *again])).step == 2


def test_another_stream_is_another_run(assets: Path, shards: Path, tmp_path: Path) -> None:
    _trainer(assets, shards, tmp_path / "run", "--training.max_steps", "1").train()
    other = tmp_path / "other"
    other.mkdir()
    image_table([png(90 + row) for row in range(9)], [0] * 9, NAMES).to_parquet(str(other / "train-0.parquet"))
    again = ["--training.max_steps", "2", "--resume_from_checkpoint", "latest"]
    with pytest.raises(ConfigurationError, match="dataset's fingerprint was"):
        _trainer(assets, other, tmp_path / "run", *again)


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_a_stream_that_breaks_off_stops_in_one_sentence_and_goes_on_when_it_is_back(
    assets: Path, shards: Path, tmp_path: Path, num_workers: str
) -> None:
    fragile = tmp_path / "shards"
    fragile.mkdir()
    for file in shards.iterdir():
        (fragile / file.name).write_bytes(file.read_bytes())
    options = ["--data.num_workers", num_workers, "--training.max_steps", "6", "--checkpoints.every", "1"]
    _trainer(assets, shards, tmp_path / "whole", *options).train()
    trainer = _trainer(assets, fragile, tmp_path / "run", *options)
    for file in fragile.iterdir():
        file.rename(tmp_path / file.name)
    with pytest.raises(DataError, match=r"^the stream .* cannot be read any further .* latest\.$") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    for file in shards.iterdir():
        (tmp_path / file.name).rename(fragile / file.name)
    _trainer(assets, fragile, tmp_path / "run", *options, "--resume_from_checkpoint", "latest").train()
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


def test_a_label_beyond_the_model_s_classes_stops_a_stream(assets: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    image_table([png(row) for row in range(9)], [0] * 8 + [7]).to_parquet(str(folder / "train.parquet"))
    trainer = _trainer(assets, folder, tmp_path / "run", "--model.num_classes", "3")
    with pytest.raises(
        ConfigurationError, match=r"^the stream holds the label 7 .* model.num_classes to at least 8\.$"
    ):
        trainer.train()


def test_unreadable_rows_are_named(
    assets: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _trainer(assets, shards, tmp_path / "run").train()
    assert "of the stream is unusable, it holds no image." in caplog.text
    assert "it has no label in the column 'label'" in caplog.text
    trainer = _trainer(assets, shards, tmp_path / "strict", "--data.on_bad_image", "raise")
    with pytest.raises(DataError, match=r"^row \d+ of the stream is unusable, .*data.on_bad_image to skip\.$"):
        trainer.train()


def test_a_folder_of_images_as_a_stream_can_be_resumed(assets: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(7):
            Image.new("RGB", (20, 20), (index * 30, number * 90, 0)).save(folder / name / f"{index}.png")
    _trainer(assets, folder, tmp_path / "whole", "--training.max_steps", "5").train()
    _trainer(assets, folder, tmp_path / "halves", "--training.max_steps", "3").train()
    again = ["--training.max_steps", "5", "--resume_from_checkpoint", "latest"]
    _trainer(assets, folder, tmp_path / "halves", *again).train()
    assert _digests(tmp_path / "whole" / "checkpoint-5") == _digests(tmp_path / "halves" / "checkpoint-5")
