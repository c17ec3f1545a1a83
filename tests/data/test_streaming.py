import itertools
import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Value
from torch.utils.data import DataLoader

from diffusers_srepa.data import streaming
from diffusers_srepa.data.batches import collate
from diffusers_srepa.data.datasets import load_image_dataset
from diffusers_srepa.data.images import read_crop
from diffusers_srepa.data.order import is_flipped
from diffusers_srepa.data.streaming import StreamingImages
from diffusers_srepa.errors import ConfigurationError, DataError
from tests.helpers.tiny_images import image_table, numbered_images, png, write_image_folder


def stream_of(table, num_shards=5, block_rows=4, **kwargs) -> StreamingImages:
    stream = load_image_dataset(table.to_iterable_dataset(num_shards=num_shards), resolution=16, seed=2, **kwargs)
    stream.block_rows = block_rows
    return stream


def numbered(count: int):
    """A table whose labels are the row numbers."""
    return image_table([png(i) for i in range(count)], list(range(count)))


def read(stream, count, **position):
    stream.set_position(**{"start_step": 0, "global_batch_size": 4, "micro_batch_size": 2, **position})
    return list(itertools.islice(stream, count))


def rows(items):
    return [int(item["class_labels"]) for item in items]


def test_an_epoch_reads_every_row_once_in_a_new_order():
    stream = stream_of(numbered(30))
    items = read(stream, 90)
    epochs = [rows(items[start : start + 30]) for start in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(30))]}) == 4


def test_rows_are_mixed_within_blocks_and_shards():
    order = rows(read(stream_of(numbered(40), num_shards=10, block_rows=8), 40))
    # A block of 8 rows holds two whole shards of 4, in whichever order.
    for start in range(0, 40, 8):
        shards = {row // 4 for row in order[start : start + 8]}
        assert len(shards) == 2
    assert order[:8] != sorted(order[:8])


@pytest.mark.parametrize(("num_shards", "block_rows"), [(10, 1), (1, 30)], ids=["shards", "blocks"])
def test_shards_and_blocks_each_have_a_new_order_every_epoch(num_shards, block_rows):
    order = rows(read(stream_of(numbered(30), num_shards=num_shards, block_rows=block_rows), 60))
    assert sorted(order[:30]) == sorted(order[30:]) == list(range(30))
    assert order[:30] != order[30:]


def test_items_are_those_of_the_map_style_dataset():
    table = numbered(12)
    items = read(stream_of(table, num_shards=12, horizontal_flip=True), 12)
    plain = load_image_dataset(table, resolution=16, seed=2)
    flips = 0
    for item in items:
        expected = plain[int(item["class_labels"])]["pixel_values"]
        flipped = is_flipped(2, item["step"], item["position"])
        flips += flipped
        assert torch.equal(item["pixel_values"], expected.flip(-1) if flipped else expected)
        assert item.keys() == {"pixel_values", "class_labels", "index", "position", "step", "replaced"}
    assert 0 < flips < 12


@pytest.mark.parametrize("num_shards", [10, 3])
def test_processes_share_the_rows_and_the_places(num_shards):
    parts = [
        read(stream_of(numbered(24), num_shards=num_shards), 12, process_index=process, num_processes=2)
        for process in range(2)
    ]
    if num_shards == 10:
        # 24 rows in 10 shards: the processes hold 13 and 11 rows, each reads its own.
        assert not set(rows(parts[0])) & set(rows(parts[1][:11]))
    else:
        assert sorted(rows(parts[0]) + rows(parts[1])) == list(range(24))
    assert [item["position"] for item in parts[1]] == [2, 3] * 6
    places = sorted((item["step"], item["position"]) for part in parts for item in part)
    assert places == [(step, position) for step in range(6) for position in range(4)]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_change_neither_rows_nor_places(micro_batch_size):
    position = {"global_batch_size": 8, "process_index": 1, "num_processes": 2}
    items = read(stream_of(numbered(24)), 8, micro_batch_size=micro_batch_size, **position)
    places = [(item["step"], item["position"]) for item in items]
    assert places == [(step, position) for step in range(2) for position in range(4, 8)]
    assert rows(items) == rows(read(stream_of(numbered(24)), 8, micro_batch_size=2, **position))


@pytest.mark.parametrize("start_step", [1, 2, 5, 7, 8, 19])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_resumed_stream_goes_on_exactly(start_step, num_processes):
    # 30 rows, blocks of 4: the steps lie inside a block, at its edge, in the short last block and in later epochs.
    position = {"process_index": num_processes - 1, "num_processes": num_processes, "num_steps": 22}
    per_step = 4 // num_processes
    arguments = {"micro_batch_size": 2, **position}
    whole = read(stream_of(numbered(30)), None, **arguments)
    assert len(whole) == 22 * per_step
    arguments["num_steps"] = 22 - start_step
    resumed = read(stream_of(numbered(30)), None, start_step=start_step, **arguments)
    tail = whole[start_step * per_step :]
    assert len(resumed) == len(tail)
    for one, two in zip(resumed, tail, strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key])) for key in two)


def test_a_resume_is_exact_beside_unreadable_rows(caplog):
    images = [png(i) if i % 3 else b"garbage" for i in range(30)]
    labels: list = list(range(30))
    labels[7] = None
    with caplog.at_level(logging.WARNING):
        whole = read(stream_of(image_table(images, labels)), 60)
    assert all(int(item["class_labels"]) % 3 and int(item["class_labels"]) != 7 for item in whole)
    assert sum(item["replaced"] > 0 for item in whole) == 2 * 11
    assert "row 0 of the stream is unusable" in caplog.text
    assert "no label" in caplog.text
    resumed = read(stream_of(image_table(images, labels)), 40, start_step=5)
    assert rows(resumed) == rows(whole[20:])


def test_an_unreadable_row_can_be_fatal():
    stream = stream_of(image_table([png(0), b"garbage"], [0, 1]), num_shards=1, on_bad_image="raise")
    with pytest.raises(DataError, match="row 1 of the stream is unusable, .*`on_bad_image`"):
        read(stream, 2)


def test_a_stream_of_broken_rows_is_given_up():
    # Its four rows, and the four of the next epoch, which might have been readable again.
    stream = stream_of(image_table([b"garbage"] * 4, [0] * 4), num_shards=2)
    with pytest.raises(DataError, match="none of the 8 rows of the stream from row 0 on"):
        read(stream, 1)


def test_a_broken_block_is_replaced_by_what_follows_it():
    # Blocks of four in one shard: rows 4 to 7 are broken, and the single row 12 of the last, short block.
    images = [b"garbage" if i in (4, 5, 6, 7, 12) else png(i) for i in range(13)]
    stream = stream_of(image_table(images, list(range(13))), num_shards=1)
    items = read(stream, 26)
    for start in (0, 13):
        epoch = items[start : start + 13]
        assert [int(item["class_labels"]) for item in epoch[4:8]] == [8] * 4
        assert [item["replaced"] for item in epoch[4:8]] == [4] * 4
        # What follows the last row of an epoch is the first of the next.
        assert (int(epoch[12]["class_labels"]), epoch[12]["replaced"]) == (0, 1)
    resumed = read(stream_of(image_table(images, list(range(13))), num_shards=1), 22, start_step=1)
    assert rows(resumed) == rows(items[4:])


def test_the_search_for_a_readable_row_ends(monkeypatch):
    monkeypatch.setattr(streaming, "MAX_REPLACEMENTS", 6)
    images = [b"garbage"] * 12 + [png(12)]
    with pytest.raises(DataError, match="none of the 6 rows of the stream from row 0 on"):
        read(stream_of(image_table(images, [0] * 13), num_shards=1), 1)


@pytest.mark.parametrize("start_step", [3, 12, 20])
def test_a_resume_decodes_no_image_that_it_skips(start_step, monkeypatch):
    decoded = []

    def counted(*arguments):
        decoded.append(arguments)
        return read_crop(*arguments)

    monkeypatch.setattr(streaming, "read_crop", counted)
    # Later epochs too: 30 rows are seven and a half steps.
    read(stream_of(numbered(30)), 5, start_step=start_step)
    assert len(decoded) == 5


def test_a_resume_in_a_loader_process_goes_on_exactly():
    whole = rows(read(stream_of(numbered(30)), 60))
    for start_step, num_workers in ((6, 1), (9, 1), (9, 0)):
        stream = stream_of(numbered(30))
        position = {"global_batch_size": 4, "micro_batch_size": 2, "num_steps": 4}
        stream.set_position(start_step=start_step, **position)
        batches = list(DataLoader(stream, batch_size=2, num_workers=num_workers, collate_fn=collate))
        labels = torch.cat([batch["class_labels"] for batch in batches]).tolist()
        assert labels == whole[start_step * 4 : start_step * 4 + 16]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_processes_change_nothing(num_workers):
    stream = stream_of(numbered(30))
    expected = read(stream, 40)
    stream.set_position(start_step=0, global_batch_size=4, micro_batch_size=2, num_steps=10)
    loader = DataLoader(stream, batch_size=2, num_workers=num_workers, collate_fn=collate)
    batches = list(loader)
    assert len(batches) == 20
    assert torch.cat([batch["class_labels"] for batch in batches]).tolist() == rows(expected)
    assert torch.cat([batch["position"] for batch in batches]).tolist() == [0, 1, 2, 3] * 10


def test_two_loader_processes_are_refused(monkeypatch):
    # As seen from inside one of two loader processes; to start them takes torch ten seconds of waiting at the end.
    monkeypatch.setattr(streaming, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ConfigurationError, match="cannot be read by 2 workers: set `num_workers`"):
        read(stream_of(numbered(8), num_shards=2), 1)


def test_a_pickled_stream_is_the_same():
    stream = stream_of(numbered(12))
    expected = rows(read(stream, 12))
    assert rows(itertools.islice(pickle.loads(pickle.dumps(stream)), 12)) == expected


def test_streams_from_files(tmp_path):
    for shard in range(2):
        table = image_table([png(shard * 5 + i) for i in range(5)], [shard * 5 + i for i in range(5)])
        table.to_parquet(str(tmp_path / f"train-{shard}.parquet"))
    stream = load_image_dataset(tmp_path, resolution=16, streaming=True, cache_dir=tmp_path / "cache")
    assert sorted(rows(read(stream, 10))) == list(range(10))
    assert stream.num_classes is None
    assert (stream.image_column, stream.label_column) == ("image", "label")


def test_a_folder_of_images_as_a_stream(tmp_path, caplog):
    folder = write_image_folder(tmp_path / "images")
    with caplog.at_level(logging.WARNING):
        stream = load_image_dataset(folder, resolution=16, streaming=True, cache_dir=tmp_path / "cache")
    assert "1 shard(s)" in caplog.text
    assert stream.id2label == {0: "cat", 1: "dog"}
    assert stream.num_classes == 2
    items = read(stream, 8)
    plain = load_image_dataset(folder, resolution=16, cache_dir=tmp_path / "cache")
    expected = sorted(plain[i]["pixel_values"].numpy().tobytes() for i in range(8))
    assert sorted(item["pixel_values"].numpy().tobytes() for item in items) == expected


def test_a_saved_dataset_as_a_stream(tmp_path):
    numbered(10).save_to_disk(str(tmp_path / "saved"))
    stream = load_image_dataset(tmp_path / "saved", resolution=16, streaming=True)
    assert sorted(rows(read(stream, 10))) == list(range(10))


def test_without_labels_there_is_one_class():
    stream = stream_of(image_table([png(i) for i in range(4)]), num_shards=2)
    assert (stream.num_classes, stream.label_column) == (1, None)
    assert rows(read(stream, 4)) == [0] * 4


def test_declared_classes_are_counted():
    stream = stream_of(numbered_images(8, classes=2), num_shards=2)
    assert stream.num_classes == 2
    assert np.bincount(rows(read(stream, 8))).tolist() == [4, 4]


def test_string_labels_need_the_whole_dataset():
    table = image_table([png(0)], ["cat"], Value("string"))
    with pytest.raises(ConfigurationError, match="strings, which a stream cannot number: unset `streaming`"):
        stream_of(table, num_shards=1)


def test_a_latent_cache_needs_row_numbers(tmp_path):
    with pytest.raises(ConfigurationError, match="`streaming` or `latent_cache`"):
        stream_of(numbered(4), num_shards=2, latent_cache=tmp_path)


def test_places_that_cannot_be_divided_are_refused():
    with pytest.raises(ConfigurationError, match="`global_batch_size` is 4"):
        read(stream_of(numbered(4), num_shards=2), 1, micro_batch_size=3)


def test_a_process_without_rows_says_so():
    stream = stream_of(numbered(1), num_shards=1)
    with pytest.raises(DataError, match="no rows for process 1 of 2"):
        read(stream, 1, process_index=1, num_processes=2)


def test_fingerprint_is_stable_and_sees_another_stream():
    first = stream_of(numbered(6), num_shards=2).fingerprint
    assert stream_of(numbered(6), num_shards=2).fingerprint == first
    assert stream_of(numbered(6), num_shards=3).fingerprint != first
    assert stream_of(image_table([png(9)] * 6, list(range(6))), num_shards=2).fingerprint != first
