"""Wrong input ends in one clear sentence before training starts, and writes nothing."""

from pathlib import Path

import pytest
from PIL import Image

from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.trainer import Trainer


def _start(assets: Path, output_dir: Path, *options: str) -> Trainer:
    arguments = ["--config", str(assets / "config.yaml"), "--output_dir", str(output_dir), *options]
    return Trainer(load_training_config(arguments))


WRONG = {
    "model preset": (["--model.preset", "SiT-XXL/2"], r"SiT-XXL/2.*model.preset"),
    "alignment preset": (["--alignment.preset", "sreppa"], r"sreppa.*srepa"),
    "objective": (["--alignment.terms.cosine.objective.name", "cosin"], r"objective 'cosin' is unknown.*cosine"),
    "objective argument": (["--alignment.terms.cosine.objective.tau", "3"], r"no argument 'tau'"),
    "term argument": (["--alignment.terms.cosine.wight", "3"], r"no argument 'wight'.*weight"),
    "projector": (["--alignment.projector.name", "mlpp"], r"projector 'mlpp' is unknown"),
    "depth": (["--alignment.depth", "4"], r"alignment.depth is 4, but the transformer has blocks 1 to 3"),
    "tap": (["--alignment.tap", "transformer_blocks.7"], r"transformer_blocks"),
    "teacher grid": (["--teacher.grid", "[8,8]"], r"teacher's grid is 8 x 8 tokens, the student's 4 x 4"),
    "term's teacher": (["--alignment.terms.cosine.target", "clip"], r"names the teacher 'clip'"),
    "term's tap": (["--alignment.terms.cosine.tap", "late"], r"names the tap 'late'"),
    "further depth": (
        ["--alignment.terms.cosine.tap", "late", "--alignment.taps.late", "5"],
        r"alignment.taps.late is 5, but the transformer has blocks 1 to 3",
    ),
    "patch size": (["--model.patch_size", "3"], r"8 x 8 cannot be cut into patches of 3"),
    "resolution": (["--data.resolution", "17"], r"data.resolution is 17, which is no multiple of 2"),
    "number of classes": (["--model.num_classes", "2"], r"labels up to 2, but model.num_classes is 2"),
    "image column": (["--data.image_column", "picture"], r"picture.*image"),
    "label column": (["--data.label_column", "kind"], r"kind.*label"),
    "split": (["--data.split", "validation"], r"validation"),
    "dataset": (["--data.dataset", "no/such/folder"], r"no/such/folder"),
    "dataset too small": (["--training.global_batch_size", "64"], r"24 rows, fewer than one global batch of 64"),
    "micro-batch": (["--training.micro_batch_size", "3"], r"training.micro_batch_size"),
    "autoencoder": (["--latents.vae", "no/such/vae"], r"no/such/vae"),
    "teacher": (["--teacher.name_or_path", "no/such/teacher"], r"no/such/teacher"),
    "class name": (["--validation.class_labels", "[cta]"], r"validation.class_labels.*cta.*cat"),
    "class number": (["--validation.class_labels", "[3]"], r"holds 3, but the classes are 0 to 2"),
    "tracker": (["--tracking.report_to", "tensorbord"], r"tensorbord"),
    "schedule": (["--optimizer.lr_schedule", "cosin"], r"optimizer.lr_schedule"),
    "start": (["--model.init_from", "no/such/run"], r"model.init_from no/such/run"),
    "resume": (["--resume_from_checkpoint", "checkpoint-7"], r"there is no checkpoint checkpoint-7"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused(assets: Path, tmp_path: Path, name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        _start(assets, tmp_path / "run", *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_is_not_trained_over(assets: Path, tmp_path: Path) -> None:
    _start(assets, tmp_path)
    with pytest.raises(ConfigurationError, match="holds another run"):
        _start(assets, tmp_path)


def test_a_coarser_student_needs_the_option_and_then_trains(assets: Path, tmp_path: Path) -> None:
    options = ["--model.patch_size", "4", "--teacher.grid", "[4,4]", "--training.max_steps", "1"]
    with pytest.raises(ConfigurationError, match="teacher.resample"):
        _start(assets, tmp_path / "run", *options)
    _start(assets, tmp_path / "run", *options, "--teacher.resample", "area").train()
    assert (tmp_path / "run" / "model_index.json").exists()


def _with_a_corrupt_image(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (20, 20), (index * 50, 0, 0)).save(folder / name / f"{index}.png")
    (folder / "cat" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    return folder


def test_a_corrupt_image_is_named_skipped_and_counted(
    assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = _with_a_corrupt_image(tmp_path / "images")
    options = ["--data.dataset", str(images), "--training.max_steps", "2"]
    trainer = _start(assets, tmp_path / "run", *options)
    trainer.train()
    assert trainer.replaced_images == 2
    assert "2" in caplog.text and "row" in caplog.text


def test_a_corrupt_image_can_be_fatal(assets: Path, tmp_path: Path) -> None:
    images = _with_a_corrupt_image(tmp_path / "images")
    trainer = _start(assets, tmp_path / "run", "--data.dataset", str(images), "--data.on_bad_image", "raise")
    with pytest.raises(ValueError, match=r"row 2\b"):
        trainer.train()
