import io
import logging
import pickle
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import DatasetDict, Value
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_srepa.data.batches import collate
from diffusers_srepa.data.datasets import load_image_dataset
from diffusers_srepa.data.order import GlobalBatchSampler, SampleKey, is_flipped
from diffusers_srepa.errors import ConfigurationError, DataError
from tests.helpers.tiny_images import image_table, jpeg, numbered_images, picture, png, write_image_folder


def crop_of(number: int) -> np.ndarray:
    """The crop of the 20 x 16 picture `number` at 16 pixels: its middle columns, channels first."""
    return np.array(picture(number))[:, 2:18].transpose(2, 0, 1)


def load(source, tmp_path, **kwargs):
    return load_image_dataset(source, **{"resolution": 16, "cache_dir": tmp_path / "cache", **kwargs})


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images")


def test_a_folder_of_class_folders(folder, tmp_path):
    dataset = load(folder, tmp_path)
    assert len(dataset) == 8
    assert (dataset.image_column, dataset.label_column) == ("image", "label")
    assert (dataset.num_classes, dataset.id2label) == (2, {0: "cat", 1: "dog"})
    item = dataset[SampleKey(index=5, step=3, position=7)]
    assert np.array_equal(item["pixel_values"].numpy(), crop_of(5))
    assert item["pixel_values"].dtype == torch.uint8
    assert item["class_labels"].dtype == torch.int64
    assert (int(item["class_labels"]), item["index"], item["step"], item["position"], item["replaced"]) == (
        1,
        5,
        3,
        7,
        0,
    )


def test_a_split_slice(folder, tmp_path):
    assert len(load(folder, tmp_path, split="train[:3]")) == 3


def test_a_parquet_file_with_image_features(tmp_path):
    numbered_images(6).to_parquet(str(tmp_path / "data.parquet"))
    dataset = load(tmp_path / "data.parquet", tmp_path)
    assert dataset.id2label == {0: "class 0", 1: "class 1"}
    assert np.array_equal(dataset[4]["pixel_values"].numpy(), crop_of(4))


def test_a_parquet_file_without_metadata(tmp_path):
    numbered_images(6).to_parquet(str(tmp_path / "typed.parquet"))
    table = pq.read_table(tmp_path / "typed.parquet").replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "plain.parquet")
    dataset = load(tmp_path / "plain.parquet", tmp_path)
    assert (dataset.num_classes, dataset.id2label) == (2, None)
    assert np.array_equal(dataset[4]["pixel_values"].numpy(), crop_of(4))


def test_a_folder_of_parquet_files_with_splits(tmp_path):
    (tmp_path / "data").mkdir()
    numbered_images(6).to_parquet(str(tmp_path / "data" / "train-0.parquet"))
    numbered_images(3).to_parquet(str(tmp_path / "data" / "test-0.parquet"))
    assert len(load(tmp_path / "data", tmp_path)) == 6
    assert len(load(tmp_path / "data", tmp_path, split="test")) == 3
    with pytest.raises(ConfigurationError, match=r"no split 'dev', its splits are 'train', 'test' .*`split`"):
        load(tmp_path / "data", tmp_path, split="dev")


def test_a_folder_of_arrow_files(tmp_path):
    numbered_images(6).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "arrow").mkdir()
    shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "arrow" / "train.arrow")
    for source in (tmp_path / "arrow", tmp_path / "arrow" / "train.arrow"):
        assert np.array_equal(load(source, tmp_path)[3]["pixel_values"].numpy(), crop_of(3))


def test_a_flat_folder_of_images_has_one_class(tmp_path):
    flat = write_image_folder(tmp_path / "images", classes=("all",)) / "all"
    dataset = load(flat, tmp_path)
    assert (len(dataset), dataset.num_classes, dataset.label_column) == (4, 1, None)


def test_a_dataset_saved_to_disk(tmp_path):
    numbered_images(6).save_to_disk(str(tmp_path / "saved"))
    assert np.array_equal(load(tmp_path / "saved", tmp_path)[3]["pixel_values"].numpy(), crop_of(3))


def test_splits_saved_to_disk(tmp_path):
    splits = DatasetDict({"train": numbered_images(6), "test": numbered_images(2)})
    splits.save_to_disk(str(tmp_path / "saved"))
    assert len(load(tmp_path / "saved", tmp_path, split="test")) == 2
    with pytest.raises(ConfigurationError, match=r"no split 'dev', its splits are 'train', 'test'"):
        load(tmp_path / "saved", tmp_path, split="dev")


def test_named_columns(tmp_path):
    table = numbered_images(4).rename_columns({"image": "photo", "label": "kind"})
    dataset = load(table, tmp_path, image_column="photo", label_column="kind")
    assert (dataset.image_column, dataset.label_column) == ("photo", "kind")
    with pytest.raises(ConfigurationError, match=r"no column 'label', its columns are 'photo' \(Image\), 'kind'"):
        load(table, tmp_path, label_column="label")


def test_without_labels_there_is_one_class(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load(image_table([png(0), png(1)]), tmp_path)
    assert "no column of labels" in caplog.text
    assert (dataset.num_classes, dataset.id2label, dataset.label_column) == (1, None, None)
    assert int(dataset[1]["class_labels"]) == 0


def test_string_labels_flow_into_id2label(tmp_path):
    table = image_table([png(i) for i in range(3)], ["pug", "akita", "pug"], Value("string"))
    dataset = load(table, tmp_path)
    assert dataset.id2label == {0: "akita", 1: "pug"}
    assert [int(dataset[i]["class_labels"]) for i in range(3)] == [1, 0, 1]


def test_a_row_without_label_is_named_at_once(tmp_path):
    with pytest.raises(DataError, match="row 1 of the dataset has no label"):
        load(image_table([png(0), png(1)], [0, None]), tmp_path)


BROKEN = {
    "no image": None,
    "empty": b"",
    "garbage": b"this is no image",
    "truncated jpeg": jpeg(0)[:900],
    "truncated png": png(0)[:200],
    "broken png": png(0)[:40] + b"\0" * 400,
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_an_unreadable_image_is_replaced_by_the_next_readable_row(broken, tmp_path, caplog):
    table = image_table([png(0), broken, b"garbage", png(3)], [0, 1, 1, 0])
    dataset = load(table, tmp_path)
    with caplog.at_level(logging.WARNING):
        item = dataset[SampleKey(1, step=0, position=0)]
    assert np.array_equal(item["pixel_values"].numpy(), crop_of(3))
    assert (item["index"], item["replaced"], int(item["class_labels"])) == (3, 2, 0)
    assert "row 1 of the dataset is unreadable" in caplog.text


def test_the_row_after_the_last_is_the_first(tmp_path):
    item = load(image_table([png(0), b"garbage"], [0, 1]), tmp_path)[1]
    assert (item["index"], item["replaced"]) == (0, 1)


def test_an_unreadable_image_can_be_fatal(tmp_path):
    dataset = load(image_table([png(0), jpeg(0)[:900]], [0, 1]), tmp_path, on_bad_image="raise")
    with pytest.raises(DataError, match=r"image of row 1 of the dataset is unreadable, .*truncated.*`on_bad_image`"):
        dataset[1]


def test_a_missing_file_is_named(folder, tmp_path):
    dataset = load(folder, tmp_path, on_bad_image="raise")
    (folder / "dog" / "0.png").unlink()
    with pytest.raises(DataError, match=r"row 4 .*dog/0.png") as error:
        dataset[4]
    assert "\n" not in str(error.value)


def test_a_dataset_of_broken_images_is_given_up(tmp_path):
    dataset = load(image_table([b"garbage"] * 5, [0] * 5), tmp_path)
    with pytest.raises(DataError, match="none of the 5 rows"):
        dataset[2]


def test_error_of_a_loader_process_names_the_row(tmp_path):
    dataset = load(image_table([png(0), b"garbage"], [0, 1]), tmp_path, on_bad_image="raise")
    with pytest.raises(DataError, match="row 1 of the dataset"):
        list(DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate))


def test_exif_rotation_is_applied(tmp_path):
    image = picture(0, (16, 32))
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    item = load(image_table([buffer.getvalue()], [0]), tmp_path)[0]
    expected = np.array(upright.crop((8, 0, 24, 16))).transpose(2, 0, 1)
    assert np.array_equal(item["pixel_values"].numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes(mode, tmp_path):
    image = load(image_table([png(0, mode=mode)], [0]), tmp_path)[0]["pixel_values"]
    expected = np.array(picture(0, mode=mode).convert("RGB"))[:, 2:18].transpose(2, 0, 1)
    assert np.array_equal(image.numpy(), expected)


def test_flips_follow_step_and_position(tmp_path):
    dataset = load(numbered_images(2), tmp_path, horizontal_flip=True, seed=5)
    seen = set()
    for position in range(16):
        pixels = dataset[SampleKey(1, step=2, position=position)]["pixel_values"].numpy()
        flipped = is_flipped(5, 2, position)
        seen.add(flipped)
        assert np.array_equal(pixels, crop_of(1)[..., ::-1] if flipped else crop_of(1))
    assert seen == {True, False}
    assert np.array_equal(dataset[1]["pixel_values"].numpy(), crop_of(1))


def batches(dataset, num_workers, **kwargs):
    sampler = GlobalBatchSampler(len(dataset), 4, 2, seed=1, num_steps=4)
    return list(DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate, **kwargs))


def test_loader_processes_change_nothing(folder, tmp_path):
    (folder / "dog" / "1.png").write_bytes(b"garbage")
    dataset = load(folder, tmp_path, horizontal_flip=True)
    alone = batches(dataset, 0)
    together = batches(dataset, 2)
    assert len(alone) == len(together) == 8
    assert sum(int(batch["replaced"].sum()) for batch in alone) > 0
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys() == {"pixel_values", "class_labels", "index", "position", "step", "replaced"}
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert alone[0]["pixel_values"].shape == (2, 3, 16, 16)
    assert alone[0]["class_labels"].dtype == torch.int64


@pytest.mark.slow
def test_spawned_loader_processes_change_nothing(folder, tmp_path):
    dataset = load(folder, tmp_path)
    for one, two in zip(batches(dataset, 0), batches(dataset, 1, multiprocessing_context="spawn"), strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])


def test_a_pickled_dataset_is_the_same(folder, tmp_path):
    dataset = load(folder, tmp_path)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3]["pixel_values"], dataset[3]["pixel_values"])
    assert copy.fingerprint == dataset.fingerprint


def test_fingerprint_of_the_same_images_is_the_same_everywhere(folder, tmp_path):
    first = load(folder, tmp_path).fingerprint
    assert load(folder, tmp_path / "another cache").fingerprint == first
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert load(tmp_path / "copy", tmp_path).fingerprint == first


def test_fingerprint_sees_content_order_and_labels(tmp_path):
    images, labels = [png(i) for i in range(4)], [0, 1, 0, 1]

    def fingerprint(images, labels):
        return load(image_table(images, labels), tmp_path).fingerprint.split("-")

    base = fingerprint(images, labels)
    changed = bytearray(images[2])
    changed[-20] ^= 1
    assert fingerprint([*images[:2], bytes(changed), images[3]], labels)[0] != base[0]
    assert fingerprint([images[1], images[0], *images[2:]], labels)[0] != base[0]
    assert fingerprint(images[:3], labels[:3])[0] != base[0]
    relabelled = fingerprint(images, [1, 1, 0, 1])
    assert relabelled[0] == base[0]
    assert relabelled[1] != base[1]


def test_fingerprint_of_a_large_dataset_sees_every_size(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_srepa.data.fingerprint.WHOLE_CONTENT_BYTES", 0)
    monkeypatch.setattr("diffusers_srepa.data.fingerprint.SAMPLED_IMAGES", 2)
    images = [png(i) for i in range(5)]
    base = load(image_table(images, [0] * 5), tmp_path).fingerprint
    assert load(image_table(images, [0] * 5), tmp_path).fingerprint == base
    longer = [*images[:2], images[2] + b"\0", *images[3:]]
    assert load(image_table(longer, [0] * 5), tmp_path).fingerprint != base


def test_fingerprint_of_a_selection(tmp_path):
    table = numbered_images(6)
    selected = load(table.select([4, 1]), tmp_path).fingerprint
    rows = image_table([png(4), png(1)], [0, 1])
    assert selected == load(rows, tmp_path).fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", r"dataset /no/such/folder does not exist \(option `name_or_path`\)"),
        ("nobody/nothing", r"nobody/nothing, split train cannot be opened .*`name_or_path`"),
    ],
)
def test_a_dataset_that_does_not_exist(source, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message) as error:
        load(source, tmp_path)
    assert "\n" not in str(error.value)


def test_files_that_are_no_dataset(tmp_path):
    (tmp_path / "notes.pdf").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="notes.pdf cannot be read as a dataset"):
        load(tmp_path / "notes.pdf", tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"garbage")
    with pytest.raises(ConfigurationError, match="bad.parquet, split train cannot be opened"):
        load(tmp_path / "bad.parquet", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="empty, split train cannot be opened"):
        load(tmp_path / "empty", tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"resolution": 0}, ConfigurationError, "`resolution` is 0"),
        ({"on_bad_image": "ignore"}, ConfigurationError, "`on_bad_image` is 'ignore'"),
        ({"need_pixels": False}, ConfigurationError, "`latent_cache`"),
    ],
)
def test_options_that_cannot_work(kwargs, error, message, tmp_path):
    with pytest.raises(error, match=message):
        load(numbered_images(2), tmp_path, **kwargs)


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        load(numbered_images(2).select([]), tmp_path)
