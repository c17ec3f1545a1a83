"""Faults of images, labels, files, networks and loader processes, map style and as a stream."""

import errno
import io
import itertools
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Value
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from diffusers_srepa.data import images
from diffusers_srepa.data.batches import collate, read_batches
from diffusers_srepa.data.datasets import load_image_dataset
from diffusers_srepa.data.order import GlobalBatchSampler
from diffusers_srepa.data.read_errors import is_outage
from diffusers_srepa.data.streaming import StreamingImages
from diffusers_srepa.errors import ConfigurationError, DataError
from tests.helpers.tiny_images import image_table, jpeg, picture, png, write_image_folder


WAYS = ["map", "map with a loader process", "stream", "stream in a loader process"]


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _bomb() -> bytes:
    """A file of some hundred bytes that claims 20,000 x 20,000 pixels."""
    header = Image.new("1", (8, 8))
    plain = bytearray(_encoded(header, "BMP"))
    plain[18:26] = np.array([20_000, 20_000], dtype="<i4").tobytes()
    return bytes(plain)


BROKEN = {
    "no image": None,
    "empty file": b"",
    "garbage": b"this is no image",
    "truncated jpeg": jpeg(0)[:900],
    "truncated png": png(0)[:200],
    "flipped bits": png(0)[:60] + b"\xff\x00\xff\x00" + png(0)[64:],
    "decompression bomb": _bomb(),
    "strip of one pixel's width": _encoded(Image.new("L", (1, 60_000)), "PNG"),
    "floating point": _encoded(Image.fromarray(np.zeros((9, 9), dtype=np.float32)), "TIFF"),
}


def _batches(table, way: str, steps: int = 1, **options) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of two, one per step."""
    workers = int("loader" in way)
    options = {"resolution": 128, "seed": 2, **options}
    if "map" in way:
        dataset = load_image_dataset(table, **options)
        sampler = GlobalBatchSampler(len(dataset), 2, 2, seed=2, num_steps=steps)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate)
    else:
        source = table.to_iterable_dataset(num_shards=1) if hasattr(table, "to_iterable_dataset") else table
        stream = load_image_dataset(source, **options)
        assert isinstance(stream, StreamingImages)
        stream.set_position(start_step=0, global_batch_size=2, micro_batch_size=2, num_steps=steps)
        loader = DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=collate)
    return read_batches(loader)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("way", ["map", "stream"])
def test_a_broken_image_is_replaced_and_counted(way, broken, caplog):
    table = image_table([png(0), broken, png(2), png(3)], [0, 1, 2, 3])
    with caplog.at_level(logging.WARNING):
        batches = list(_batches(table, way, steps=2))
    labels = torch.cat([batch["class_labels"] for batch in batches])
    replaced = torch.cat([batch["replaced"] for batch in batches])
    assert sorted(labels.tolist()) == [0, 2, 2, 3]
    assert labels[replaced == 1].tolist() == [2] and int(replaced.sum()) == 1
    assert "row 1 of the" in caplog.text


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("way", ["map", "stream"])
def test_a_broken_image_can_be_fatal(way, broken):
    table = image_table([broken] * 4, [0] * 4)
    with pytest.raises(DataError, match=r"row \d of the .*: repair it, or set `on_bad_image` to skip\.$") as error:
        list(_batches(table, way, on_bad_image="raise"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_dataset_of_broken_images_is_given_up(way):
    with pytest.raises(DataError, match=r"^none of the \d+ rows of the") as error:
        list(_batches(image_table([b"garbage"] * 4, [0] * 4), way))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_fatal_image_is_one_sentence_from_any_process(way):
    with pytest.raises(DataError, match=r"row \d of the .* `on_bad_image` to skip\.$") as error:
        list(_batches(image_table([b"garbage"] * 4, [0] * 4), way, on_bad_image="raise"))
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def _animated() -> bytes:
    frames = [picture(number).quantize(16) for number in (5, 6)]
    return _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


PICTURES = {
    "palette": (png(5, mode="P"), picture(5, mode="P").convert("RGB")),
    "CMYK": (_encoded(Image.new("CMYK", (20, 16), (0, 255, 0, 0)), "TIFF"), Image.new("RGB", (20, 16), (255, 0, 255))),
    "16 bits": (
        _encoded(Image.fromarray(np.full((16, 20), 257 * 99, dtype=np.uint16)), "PNG"),
        Image.new("RGB", (20, 16), (99, 99, 99)),
    ),
    "alpha": (
        _encoded(Image.new("RGBA", (20, 16), (10, 20, 30, 0)), "PNG"),
        Image.new("RGB", (20, 16), (255, 255, 255)),
    ),
    "grey with alpha": (
        _encoded(Image.new("LA", (20, 16), (7, 51)), "PNG"),
        Image.new("RGB", (20, 16), (205, 205, 205)),
    ),
    "bilevel": (_encoded(Image.new("1", (20, 16), 1), "PNG"), Image.new("RGB", (20, 16), (255, 255, 255))),
    "animated": (_animated(), picture(5).quantize(16).convert("RGB")),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("way", ["map", "stream"])
def test_pictures_of_any_kind_are_read(way, kind):
    encoded, expected = PICTURES[kind]
    batch = next(_batches(image_table([encoded] * 2, [0, 0]), way, resolution=16))
    crop = np.asarray(expected)[:, 2:18].transpose(2, 0, 1)
    assert int(batch["replaced"].sum()) == 0
    assert np.array_equal(batch["pixel_values"][0].numpy(), crop)


@pytest.mark.parametrize("label", [None, -1])
def test_a_row_without_label(label, caplog):
    table = image_table([png(i) for i in range(4)], [0, label, 2, 3])
    with pytest.raises(DataError, match=r"row 1 of the dataset has no label in the column 'label'"):
        load_image_dataset(table, resolution=16)
    with caplog.at_level(logging.WARNING):
        batches = list(_batches(table, "stream", steps=2))
    labels = torch.cat([batch["class_labels"] for batch in batches])
    assert sorted(labels.tolist()) == [0, 2, 2, 3]
    assert f"row 1 of the stream is unusable, it has no label in the column 'label' (found {label})" in caplog.text


def test_a_label_out_of_range(tmp_path):
    # A ClassLabel checks what is put into it, but not what a file claims.
    table = image_table([png(i) for i in range(2)], [0, 5])
    names = ClassLabel(names=["cat", "dog"])
    table.info.features["label"] = names
    table._info.features["label"] = names
    with pytest.raises(DataError, match=r"the label 5 of row 1 of the dataset is outside the column's 2 classes"):
        load_image_dataset(table, resolution=16)


@pytest.mark.parametrize("way", WAYS[2:])
def test_a_label_out_of_range_stops_a_stream(way):
    table = image_table([png(i) for i in range(2)], [0, 5], Value("int64"))
    stream = load_image_dataset(table.to_iterable_dataset(num_shards=1), resolution=16)
    stream.num_classes = 3
    stream.set_position(start_step=0, global_batch_size=2, micro_batch_size=2, num_steps=1)
    loader = DataLoader(stream, batch_size=2, num_workers=int("loader" in way), collate_fn=collate)
    with pytest.raises(ConfigurationError, match=r"^the stream holds the label 5 .* at least 6\.$"):
        list(read_batches(loader))


class _Dying(Dataset):
    """Ends the loader process that reads its third item."""

    def __init__(self, end) -> None:
        self.end = end

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        if index == 2 and get_worker_info() is not None:
            self.end()
        return index


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit_later() -> None:
    time.sleep(0.5)
    os._exit(3)


def test_a_loader_process_that_is_killed():
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError) as error:
        list(read_batches(DataLoader(_Dying(_kill), batch_size=1, num_workers=2)))
    message = str(error.value)
    assert message.startswith("one of the 2 loader process(es) died (is killed by signal: Killed)")
    assert "lower `num_workers`" in message and "`resume_from_checkpoint`" in message
    assert "\n" not in message
    # Torch's own handler stays when it was the first loader of this program; ours never does.
    after = signal.getsignal(signal.SIGCHLD)
    assert after is before or getattr(after, "__module__", "").startswith("torch.")


def test_the_death_of_a_loader_process_does_not_interrupt_the_step():
    loader = DataLoader(_Dying(_exit_later), batch_size=1, num_workers=1, prefetch_factor=4)
    batches = read_batches(loader)
    assert next(batches).tolist() == [0]
    # A step that is long enough for the process to die in it.
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(DataError, match=r"died \(exited unexpectedly with exit code 3\)"):
        next(batches)


class _Failing(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise self.error


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [ConnectionError("no route to the server"), OSError(errno.EIO, "Input/output error"), MemoryError()],
    ids=["network", "disk", "memory"],
)
def test_faults_of_the_machine_are_one_sentence(error, num_workers):
    with pytest.raises(DataError) as raised:
        next(read_batches(DataLoader(_Failing(error), num_workers=num_workers)))
    message = str(raised.value)
    assert message.startswith("the dataset cannot be read any further (") and "\n" not in message
    assert (str(error) or "MemoryError") in message and "Traceback" not in message
    assert "`name_or_path`" in message and "`resume_from_checkpoint`" in message


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="Traceback"):
        next(read_batches(DataLoader(_Failing(ZeroDivisionError("x")), num_workers=1)))


def test_an_outage_is_not_taken_for_a_broken_image(monkeypatch):
    def too_many(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(images._DECODER, "decode_example", too_many, raising=False)
    dataset = load_image_dataset(image_table([png(0)], [0]), resolution=16)
    with pytest.raises(ConnectionError, match="Too many open files"):
        dataset[0]


def test_what_is_an_outage():
    class Answer(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    wrapped = ValueError("wrapped")
    wrapped.__cause__ = TimeoutError("slow")
    for error in (
        ConnectionResetError(),
        TimeoutError(),
        wrapped,
        Answer(503),
        Answer(429),
        OSError(errno.ESTALE, ""),
    ):
        assert is_outage(error), error
    for error in (OSError("cannot identify"), FileNotFoundError(2, "gone"), Answer(404), ValueError("x")):
        assert not is_outage(error), error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_that_disappear_while_training(tmp_path: Path, num_workers):
    folder = write_image_folder(tmp_path / "images", per_class=8)
    dataset = load_image_dataset(folder, resolution=16, cache_dir=tmp_path / "cache")
    sampler = GlobalBatchSampler(16, 4, 4, seed=0, num_steps=40)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate)
    batches = read_batches(loader)
    assert int(next(batches)["replaced"].sum()) == 0
    for index in range(7):
        (folder / "dog" / f"{index}.png").unlink()
    later = list(itertools.islice(batches, 12))
    assert sum(int(batch["replaced"].sum()) for batch in later) > 0
    for file in folder.rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"^none of the 16 rows of the dataset") as error:
        list(batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_of_a_stream_that_disappears(tmp_path: Path, num_workers):
    for shard in range(4):
        table = image_table([png(shard * 5 + i) for i in range(5)], list(range(5)))
        table.to_parquet(str(tmp_path / f"train-{shard}.parquet"))
    stream = load_image_dataset(tmp_path, resolution=16, streaming=True, cache_dir=tmp_path / "cache")
    stream.block_rows = 5
    stream.set_position(start_step=0, global_batch_size=5, micro_batch_size=5)
    loader = DataLoader(stream, batch_size=5, num_workers=num_workers, collate_fn=collate)
    batches = read_batches(loader)
    assert int(next(batches)["replaced"].sum()) == 0
    for file in tmp_path.glob("*.parquet"):
        file.unlink()
    with pytest.raises(
        DataError, match=r"^the stream .* cannot be read any further \(.*\): see to .* `resume_from_checkpoint`\.$"
    ) as error:
        list(itertools.islice(batches, 20))
    assert "\n" not in str(error.value)


def test_a_garbled_shard_of_a_stream(tmp_path: Path):
    for shard in range(2):
        image_table([png(i) for i in range(4)], [0] * 4).to_parquet(str(tmp_path / f"train-{shard}.parquet"))
    stream = load_image_dataset(tmp_path, resolution=16, streaming=True, cache_dir=tmp_path / "cache")
    for file in tmp_path.glob("*.parquet"):
        file.write_bytes(b"PAR1" + b"\0" * 300 + b"PAR1")
    with pytest.raises(DataError, match=r"^the stream .* cannot be read any further"):
        next(iter(stream))
    with pytest.raises(DataError, match=r"^the stream .* cannot be read any further"):
        _ = stream.fingerprint


def test_a_table_that_disappears_stays_open(tmp_path: Path):
    image_table([png(i) for i in range(4)], [0, 1, 2, 3]).save_to_disk(str(tmp_path / "saved"))
    dataset = load_image_dataset(tmp_path / "saved", resolution=16)
    before = [dataset[row]["pixel_values"] for row in range(4)]
    shutil.rmtree(tmp_path / "saved")
    assert all(torch.equal(dataset[row]["pixel_values"], before[row]) for row in range(4))
