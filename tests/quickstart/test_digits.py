"""The quickstart's dataset: real digits, split without overlap, in the form that the loader reads."""

from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("sklearn")

from digits import CLASS_NAMES, load_digit_split, read_digits, render_digit, split_file, write_digits  # noqa: E402


def test_every_digit_is_in_one_split_and_keeps_its_label():
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    parts = [load_digit_split(split) for split in ("train", "test")]
    assert [len(images) for images, _ in parts] == [1497, 300]
    found = [(image.tobytes(), int(label)) for part in parts for image, label in zip(*part, strict=True)]
    for scan, label in zip(scans[::12].reshape(-1, 8, 8), labels[::12], strict=True):
        assert found.count((render_digit(scan).tobytes(), int(label))) == 1


def test_split_is_balanced():
    _, labels = load_digit_split("test")
    counts = np.bincount(labels, minlength=10)
    assert counts.min() >= 28
    assert counts.max() <= 32


def test_drawing_keeps_the_scan():
    scan = np.zeros((8, 8))
    scan[2:6, 3] = 16
    image = render_digit(scan)
    assert image.shape == (32, 32)
    assert image.dtype == np.uint8
    # A pixel of the scan is 3.2 wide and the margin one of them: rows 9.6 to 22.4, columns 12.8 to 16.
    rows, columns = np.nonzero(image > 128)
    assert (rows.min(), rows.max()) == (10, 21)
    assert (columns.min(), columns.max()) == (13, 15)
    assert image[:8].max() == 0
    assert render_digit(np.full((8, 8), 16.0))[16, 16] == 255
    assert render_digit(np.full((8, 8), 8.0))[16, 16] == 128


def test_datasets_reads_names_and_rgb(digits_folder: Path, tmp_path: Path):
    from datasets import load_dataset

    dataset = load_dataset(str(digits_folder), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 1497, "test": 300}
    assert tuple(dataset["train"].features["label"].names) == CLASS_NAMES
    row = dataset["test"][5]
    assert row["image"].mode == "RGB"
    images, labels = load_digit_split("test")
    np.testing.assert_array_equal(np.asarray(row["image"]), np.repeat(images[5][..., None], 3, axis=2))
    assert row["label"] == labels[5]


def test_read_digits(digits_folder: Path):
    images, labels = read_digits(digits_folder, "test")
    expected, expected_labels = load_digit_split("test")
    np.testing.assert_array_equal(images[..., 1], expected)
    np.testing.assert_array_equal(labels, expected_labels)
    assert images.shape == (300, 32, 32, 3)


def test_shipped_copy_is_what_the_script_draws(quickstart: Path):
    for split in ("train", "test"):
        images, labels = read_digits(quickstart / "data", split)
        expected, expected_labels = load_digit_split(split)
        np.testing.assert_array_equal(images, np.repeat(expected[..., None], 3, axis=-1))
        np.testing.assert_array_equal(labels, expected_labels)


def test_writing_twice_changes_nothing_and_repairs(tmp_path: Path):
    write_digits(tmp_path)
    train, test = split_file(tmp_path, "train"), split_file(tmp_path, "test")
    times, content = train.stat().st_mtime_ns, test.read_bytes()
    test.unlink()
    write_digits(tmp_path)
    assert train.stat().st_mtime_ns == times
    assert test.read_bytes() == content
    assert sorted(path.name for path in test.parent.iterdir()) == sorted([train.name, test.name])


def test_missing_split_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="train-00000-of-00001.parquet does not exist"):
        read_digits(tmp_path, "train")
