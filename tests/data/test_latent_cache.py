import json
import os
import pickle
import resource
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_srepa.data.batches import collate, read_batches
from diffusers_srepa.data.datasets import load_image_dataset
from diffusers_srepa.data.latent_cache import verify, write
from diffusers_srepa.data.latent_cache.read import LatentCache
from diffusers_srepa.data.latent_cache.write import cache_latents
from diffusers_srepa.data.order import GlobalBatchSampler, SampleKey, is_flipped
from diffusers_srepa.errors import ConfigurationError, DataError
from diffusers_srepa.files import sha256
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.latents.pixels import PixelLatents
from tests.helpers.tiny_autoencoder import tiny_autoencoder
from tests.helpers.tiny_images import image_table, numbered_images, png


OPTIONS = {"batch_size": 2, "shard_rows": 3, "dtype": "float32", "show_progress": False}


@pytest.fixture(scope="module")
def latent_space() -> AutoencoderKLLatents:
    return AutoencoderKLLatents(tiny_autoencoder())


def load(table, **kwargs):
    return load_image_dataset(table, **{"resolution": 16, "seed": 4} | kwargs)


def moments_of(latent_space, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat(latent_space.encode_moments(pixels[None].float() / 255), dim=1)[0]


def in_a_child(action) -> int:
    """Run `action` in a forked process and return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_cache_holds_the_moments_of_every_row(latent_space, tmp_path):
    dataset = load(numbered_images(8))
    cache = cache_latents(dataset, latent_space, tmp_path, **OPTIONS)
    assert cache.layout.rows == 8
    assert cache.layout.num_shards == 3
    for row in range(8):
        expected = moments_of(latent_space, dataset[row]["pixel_values"])
        assert expected.shape == cache.moments(row).shape == (8, 4, 4)
        torch.testing.assert_close(cache.moments(row), expected)


def test_half_precision_halves_the_files(latent_space, tmp_path):
    dataset = load(numbered_images(5))
    full = cache_latents(dataset, latent_space, tmp_path / "full", **OPTIONS)
    half = cache_latents(dataset, latent_space, tmp_path / "half", **OPTIONS | {"dtype": "float16"})
    assert (tmp_path / "full/shard_00001.bin").stat().st_size == 2 * 8 * 16 * 4
    assert (tmp_path / "half/shard_00001.bin").stat().st_size == 2 * 8 * 16 * 2
    assert half.moments(4).dtype == torch.float32
    torch.testing.assert_close(half.moments(4), full.moments(4), rtol=1e-3, atol=1e-6)


def test_items_hold_moments_and_the_same_crop(latent_space, tmp_path):
    table = numbered_images(8)
    plain = load(table)
    cache_latents(plain, latent_space, tmp_path, **OPTIONS)
    both = load(table, latent_cache=tmp_path, encoder_id=latent_space.encoder_id)
    item = both[SampleKey(5, step=1, position=2)]
    assert torch.equal(item["pixel_values"], plain[5]["pixel_values"])
    torch.testing.assert_close(item["moments"], moments_of(latent_space, item["pixel_values"]))
    moments_only = load(table, latent_cache=tmp_path, need_pixels=False)[5]
    assert "pixel_values" not in moments_only
    assert torch.equal(moments_only["moments"], item["moments"])
    assert int(moments_only["class_labels"]) == 1


def test_flips_take_the_latent_of_the_mirrored_crop(latent_space, tmp_path):
    table = numbered_images(4)
    cache_latents(load(table), latent_space, tmp_path, flip=True, **OPTIONS)
    dataset = load(table, latent_cache=tmp_path, horizontal_flip=True)
    seen = set()
    for position in range(12):
        item = dataset[SampleKey(2, step=0, position=position)]
        seen.add(is_flipped(4, 0, position))
        # An autoencoder does not commute with mirroring, so this tells the two copies apart.
        torch.testing.assert_close(item["moments"], moments_of(latent_space, item["pixel_values"]))
    assert seen == {True, False}
    unflipped = load(table, latent_cache=tmp_path)
    for position in range(12):
        item = unflipped[SampleKey(2, step=0, position=position)]
        torch.testing.assert_close(item["moments"], moments_of(latent_space, load(table)[2]["pixel_values"]))


def test_loader_processes_change_nothing(latent_space, tmp_path):
    table = numbered_images(8)
    cache_latents(load(table), latent_space, tmp_path, **OPTIONS)
    dataset = load(table, latent_cache=tmp_path)
    results = []
    for num_workers in (0, 2):
        sampler = GlobalBatchSampler(8, 4, 2, seed=0, num_steps=3)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate)
        results.append(torch.cat([batch["moments"] for batch in loader]))
    assert torch.equal(*results)
    assert results[0].shape == (12, 8, 4, 4)


def test_a_pickled_cache_leaves_its_shards_behind(tmp_path):
    cache = cache_latents(load(numbered_images(6)), PixelLatents(), tmp_path, **OPTIONS)
    before = cache.moments(0)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 2_000 < before.numel() * 4
    assert torch.equal(pickle.loads(pickled).moments(0), before)


def test_writing_with_loader_processes(tmp_path):
    dataset = load(numbered_images(7))
    alone = cache_latents(dataset, PixelLatents(), tmp_path / "0", **OPTIONS)
    together = cache_latents(dataset, PixelLatents(), tmp_path / "2", num_workers=2, **OPTIONS)
    assert all(torch.equal(alone.moments(row), together.moments(row)) for row in range(7))


def test_processes_share_the_shards(tmp_path):
    dataset = load(numbered_images(8))
    assert cache_latents(dataset, PixelLatents(), tmp_path, process_index=1, num_processes=2, **OPTIONS) is None
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["shard_00001.bin"]
    with pytest.raises(ConfigurationError, match="not finished: run the same diffusers-srepa cache-latents"):
        LatentCache.open(tmp_path)
    cache = cache_latents(dataset, PixelLatents(), tmp_path, process_index=0, num_processes=2, **OPTIONS)
    single = cache_latents(dataset, PixelLatents(), tmp_path / "single", **OPTIONS)
    assert all(torch.equal(cache.moments(row), single.moments(row)) for row in range(8))


class KilledLatents(PixelLatents):
    """Pixels in a process that is killed when it encodes for the n-th time."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def _encode(self, images):
        self.calls -= 1
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._encode(images)


@pytest.mark.parametrize("calls", [1, 2, 4, 5])
def test_a_killed_run_goes_on_where_it_was(calls, tmp_path):
    # Rows 0-2, 3-5 and 6-7 are shards of two, two and one batches.
    dataset = load(numbered_images(8))
    status = in_a_child(lambda: cache_latents(dataset, KilledLatents(calls), tmp_path, **OPTIONS))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    done = sorted(tmp_path.glob("*.bin"))
    assert len(done) == (calls - 1) // 2
    stamps = [path.stat().st_mtime_ns for path in done]
    cache = cache_latents(dataset, PixelLatents(), tmp_path, **OPTIONS)
    assert [path.stat().st_mtime_ns for path in done] == stamps
    for row in range(8):
        torch.testing.assert_close(cache.moments(row), moments_of(PixelLatents(), dataset[row]["pixel_values"]))
    assert not list(tmp_path.glob("*incomplete*"))


def test_a_shard_that_was_not_marked_as_done_is_written_again(tmp_path):
    dataset = load(numbered_images(6))
    cache_latents(dataset, PixelLatents(), tmp_path, process_index=0, num_processes=2, **OPTIONS)
    (tmp_path / "shard_00000.json").unlink()
    (tmp_path / "shard_00000.bin").write_bytes(b"half a sh")
    cache = cache_latents(dataset, PixelLatents(), tmp_path, **OPTIONS)
    assert torch.equal(cache.moments(0), moments_of(PixelLatents(), dataset[0]["pixel_values"]))


def test_a_finished_cache_is_left_alone(tmp_path):
    dataset = load(numbered_images(6))
    cache_latents(dataset, PixelLatents(), tmp_path, **OPTIONS)
    stamp = (tmp_path / "shard_00000.bin").stat().st_mtime_ns
    assert cache_latents(dataset, PixelLatents(), tmp_path, **OPTIONS).layout.rows == 6
    assert (tmp_path / "shard_00000.bin").stat().st_mtime_ns == stamp


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    dataset = load(numbered_images(8))
    message = tmp_path / "message"

    def write_with_small_files():
        # A shard has 3 x 6 x 16 x 16 x 4 bytes, the JSON files some hundred.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            cache_latents(dataset, PixelLatents(), tmp_path / "cache", **OPTIONS)
        except DataError as error:
            message.write_text(str(error))

    in_a_child(write_with_small_files)
    assert "could not be written (File too large)" in message.read_text()
    assert "\n" not in message.read_text()
    assert cache_latents(dataset, PixelLatents(), tmp_path / "cache", **OPTIONS).layout.rows == 8


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be written .Not a directory"):
        cache_latents(load(numbered_images(2)), PixelLatents(), tmp_path / "file" / "cache", **OPTIONS)


def test_a_disk_that_is_too_small_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ConfigurationError, match=r"takes 0.0 GiB more, but .* has 0.0 GiB free"):
        cache_latents(load(numbered_images(6)), PixelLatents(), tmp_path, **OPTIONS)


def test_unreadable_rows_are_recorded_and_replaced(tmp_path):
    images = [png(i) for i in range(6)]
    images[2] = b"garbage"
    table = image_table(images, list(range(6)))
    cache = cache_latents(load(table), PixelLatents(), tmp_path, **OPTIONS)
    assert cache.unreadable == {2}
    with pytest.raises(DataError, match="row 2 of the dataset was unreadable"):
        cache.moments(2)
    for need_pixels in (True, False):
        item = load(table, latent_cache=tmp_path, need_pixels=need_pixels)[2]
        assert (item["index"], item["replaced"], int(item["class_labels"])) == (3, 1, 3)
        assert torch.equal(item["moments"], cache.moments(3))
    strict = load(table, latent_cache=tmp_path, need_pixels=False, on_bad_image="raise")
    with pytest.raises(DataError, match="`on_bad_image`"):
        strict[2]


def test_unreadable_rows_can_be_fatal(tmp_path):
    dataset = load(image_table([png(0), b"garbage"], [0, 1]), on_bad_image="raise")
    with pytest.raises(DataError, match="row 1 of the dataset is unreadable"):
        cache_latents(dataset, PixelLatents(), tmp_path, **OPTIONS)


def test_a_cache_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="not one image"):
        cache_latents(load(image_table([b"garbage"] * 2, [0, 1])), PixelLatents(), tmp_path, **OPTIONS)


@pytest.fixture
def finished(tmp_path):
    cache_latents(load(numbered_images(4)), PixelLatents(), tmp_path / "cache", **OPTIONS)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        ({"fingerprint": "0123-45"}, r"for another dataset \(fingerprint .*`name_or_path`"),
        (
            {"encoder_id": "AutoencoderKL-1"},
            r"with the encoder pixels, not with AutoencoderKL-1: change the autoencoder",
        ),
        ({"resolution": 32}, r"crops of 16 pixels, but `resolution` is 32"),
        ({"flip": True}, r"no mirrored latents \(`flip`\), but `horizontal_flip` is on"),
    ],
)
def test_another_cache_is_refused(finished, needed, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        LatentCache.open(finished).check(**needed)
    assert "\n" not in str(error.value)


def test_what_fits_is_opened(finished):
    cache = LatentCache.open(finished)
    cache.check(
        fingerprint=load(numbered_images(4)).fingerprint,
        encoder_id="pixels",
        resolution=16,
        flip=False,
    )
    assert cache.layout.rows == 4


@pytest.mark.parametrize(
    ("table", "kwargs", "message"),
    [
        (numbered_images(5), {}, "holds 4 rows, but the dataset has 5"),
        (image_table([png(i + 1) for i in range(4)], [0] * 4), {}, "another dataset"),
        (numbered_images(4), {"resolution": 8}, "`resolution` is 8"),
        (numbered_images(4), {"horizontal_flip": True}, "no mirrored latents"),
        (numbered_images(4), {"encoder_id": "another"}, "not with another"),
    ],
)
def test_a_dataset_refuses_the_cache_of_another(finished, table, kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        load(table, latent_cache=finished, **kwargs)


def test_other_labels_may_use_the_same_cache(finished):
    relabelled = image_table([png(i) for i in range(4)], [3, 2, 1, 0])
    assert int(load(relabelled, latent_cache=finished)[1]["class_labels"]) == 2


def test_a_folder_of_another_cache_is_not_overwritten(finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(ConfigurationError, match=r"holds a latent cache of something else \(rows 4, not 5"):
        cache_latents(load(numbered_images(5)), PixelLatents(), finished, **OPTIONS)
    with pytest.raises(ConfigurationError, match="something else .dtype float32, not float16"):
        cache_latents(load(numbered_images(4)), PixelLatents(), finished, **OPTIONS | {"dtype": "float16"})
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_an_unfinished_cache_is_only_continued_as_it_began(tmp_path):
    dataset = load(numbered_images(8))
    cache_latents(dataset, PixelLatents(), tmp_path, num_processes=2, **OPTIONS)
    with pytest.raises(ConfigurationError, match="shard_rows 3, not 4"):
        cache_latents(dataset, PixelLatents(), tmp_path, **OPTIONS | {"shard_rows": 4})


def test_damage_is_found_when_the_cache_is_opened(finished):
    shard = finished / "shard_00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ConfigurationError, match=rf"damaged, because .*shard_00001.bin has {len(content) - 1} bytes"):
        LatentCache.open(finished)
    shard.unlink()
    with pytest.raises(ConfigurationError, match="has 0 bytes"):
        LatentCache.open(finished)


def swap(folder):
    # Of two shards of one size.
    one, other = folder / "shard_00000.bin", folder / "shard_00001.bin"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def zero(folder):
    file = folder / "shard_00001.bin"
    file.write_bytes(bytes(file.stat().st_size))


def truncate(folder):
    os.truncate(folder / "shard_00001.bin", 100)


def lose(folder):
    (folder / "shard_00001.bin").unlink()


DAMAGES = {"swapped": swap, "zeroed": zero, "truncated": truncate, "lost": lose}


@pytest.fixture
def two_shards(tmp_path):
    cache_latents(load(numbered_images(6)), PixelLatents(), tmp_path / "cache", **OPTIONS)
    return tmp_path / "cache"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_shards_are_named_and_written_again_by_the_same_command(two_shards, damage):
    before = {file.name: file.read_bytes() for file in two_shards.iterdir() if file.name != "latents.verified.json"}
    damage(two_shards)
    for thorough in (False, True):
        with pytest.raises(ConfigurationError, match="shard_00001.bin has .* run the same .*cache-latents") as error:
            LatentCache.open(two_shards, verify=thorough)
        assert "\n" not in str(error.value)
    assert ("shard_00000.bin" in str(error.value)) == (damage is swap)
    dataset = load(numbered_images(6))
    assert cache_latents(dataset, PixelLatents(), two_shards, process_index=1, num_processes=2, **OPTIONS) is None
    cache = cache_latents(dataset, PixelLatents(), two_shards, process_index=0, num_processes=2, **OPTIONS)
    assert cache is not None
    after = {file.name: file.read_bytes() for file in two_shards.iterdir() if file.name != "latents.verified.json"}
    assert after == before


def test_a_repair_that_was_killed_goes_on(two_shards):
    dataset = load(numbered_images(6))
    shards = {file: file.read_bytes() for file in two_shards.glob("*.bin")}
    swap(two_shards)
    status = in_a_child(lambda: cache_latents(dataset, KilledLatents(3), two_shards, **OPTIONS))
    assert os.WIFSIGNALED(status) and not (two_shards / "latents.json").exists()
    assert cache_latents(dataset, PixelLatents(), two_shards, process_index=1, num_processes=2, **OPTIONS) is None
    assert cache_latents(dataset, PixelLatents(), two_shards, num_processes=2, **OPTIONS) is not None
    assert {file: file.read_bytes() for file in two_shards.glob("*.bin")} == shards


def test_a_cache_is_hashed_once(two_shards, monkeypatch):
    hashed = []
    monkeypatch.setattr(verify, "sha256", lambda file: hashed.append(file.name) or sha256(file))
    LatentCache.open(two_shards)
    assert not hashed, "the command that wrote it has opened it"
    os.utime(two_shards / "shard_00001.bin")
    for _ in range(2):
        LatentCache.open(two_shards)
    assert hashed == ["shard_00001.bin"]
    (two_shards / "latents.verified.json").write_text("no JSON")
    stamps = {file: file.stat().st_mtime_ns for file in two_shards.iterdir()}
    LatentCache.open(two_shards, verify=True)
    assert len(hashed) == 3
    assert {file: file.stat().st_mtime_ns for file in two_shards.iterdir()} == stamps


def test_a_cache_without_checksums_opens(two_shards):
    content = json.loads((two_shards / "latents.json").read_text())
    del content["sha256"]
    (two_shards / "latents.json").write_text(json.dumps(content))
    (two_shards / "latents.verified.json").unlink()
    zero(two_shards)
    assert LatentCache.open(two_shards, verify=True).checksums is None
    truncate(two_shards)
    with pytest.raises(ConfigurationError, match="shard_00001.bin has 100 bytes"):
        LatentCache.open(two_shards)


def test_a_shard_that_is_truncated_while_it_is_read_is_one_sentence(two_shards):
    dataset = load(numbered_images(6), latent_cache=two_shards, need_pixels=False)
    dataset[3], dataset[5]

    def read_after_truncation():
        truncate(two_shards)
        with pytest.raises(ConfigurationError, match="cannot be read any more .it ends before row 5.: bring it back"):
            dataset[5]
        os._exit(7)

    assert os.waitstatus_to_exitcode(in_a_child(read_after_truncation)) == 7, "SIGBUS would end the process"


@pytest.mark.parametrize("process_index", [0, 1])
def test_two_at_once_are_refused(tmp_path, process_index):
    dataset = load(numbered_images(6))
    options = OPTIONS | {"process_index": process_index, "num_processes": 2}

    def second():
        with pytest.raises(ConfigurationError, match="in use by a cache-latents that goes on .process .*`output_dir`"):
            cache_latents(dataset, PixelLatents(), tmp_path, **options)
        os._exit(7)

    class Meanwhile(PixelLatents):
        """Pixels while which a second process tries the same folder."""

        def _encode(self, images):
            assert os.waitstatus_to_exitcode(in_a_child(second)) == 7
            return super()._encode(images)

    cache_latents(dataset, Meanwhile(), tmp_path, **options)
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "0000.png").write_bytes(png(1))
    with pytest.raises(
        ConfigurationError, match=r"is not empty \(0000.png\) and holds no latent cache: .*`output_dir`"
    ):
        cache_latents(load(numbered_images(6)), PixelLatents(), tmp_path, **OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["0000.png"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}'])
def test_a_damaged_layout_is_one_sentence(finished, content):
    (finished / "latents.json").write_text(content)
    with pytest.raises(ConfigurationError, match="latents.json is damaged"):
        LatentCache.open(finished)


def test_a_cache_of_a_later_format_is_refused(finished):
    layout = json.loads((finished / "latents.json").read_text())
    (finished / "latents.json").write_text(json.dumps(layout | {"version": 2}))
    with pytest.raises(ConfigurationError, match="has format 2, but this version reads format 1"):
        LatentCache.open(finished)


def test_a_folder_without_cache_is_one_sentence(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigurationError, match="there is no latent cache in .*cache-latents.*`latent_cache`"):
            LatentCache.open(folder)


class LargeLatents(PixelLatents):
    """Pixels whose latents leave the range of float16."""

    def _encode(self, images):
        mean, std = super()._encode(images)
        return mean + 1e5, std


def test_latents_beyond_the_range_of_the_dtype_are_refused(tmp_path):
    with pytest.raises(DataError, match="float16 cannot hold: set `dtype` to float32"):
        cache_latents(load(numbered_images(2)), LargeLatents(), tmp_path, **OPTIONS | {"dtype": "float16"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat16"}, "'bfloat16', but must be"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"shard_rows": 0}, "`shard_rows` is 0"),
        ({"process_index": 1}, "`process_index` is 1"),
    ],
)
def test_options_that_cannot_work(arguments, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        cache_latents(load(numbered_images(2)), PixelLatents(), tmp_path, **OPTIONS | arguments)


def test_a_resolution_that_the_latent_space_cannot_encode(latent_space, tmp_path):
    with pytest.raises(ValueError, match="multiples of 4.*`resolution`"):
        cache_latents(load(numbered_images(2), resolution=18), latent_space, tmp_path, **OPTIONS)


def test_what_is_read_is_the_caller_s_own(finished):
    cache = LatentCache.open(finished)
    cache.moments(0)[:] = 0
    assert np.abs(cache.moments(0).numpy()).sum() > 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_disappears_is_not_taken_for_unreadable_images(tmp_path, num_workers):
    table = numbered_images(9)
    cache_latents(load(table), PixelLatents(), tmp_path, **OPTIONS)
    dataset = load(table, latent_cache=tmp_path)
    (tmp_path / "shard_00001.bin").unlink()
    sampler = GlobalBatchSampler(9, 9, 9, seed=0, num_steps=1)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate)
    with pytest.raises(ConfigurationError, match="shard_00001.bin of the latent cache cannot be read any") as error:
        next(read_batches(loader))
    assert "\n" not in str(error.value) and "`latent_cache`" in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_of_the_machine_while_caching_says_how_to_go_on(tmp_path, num_workers):
    class Unreachable:
        """A dataset whose images lie on a server that is down."""

        on_bad_image, resolution, fingerprint = "skip", 16, "0-0"

        def __len__(self):
            return 4

        def read_pixels(self, row):
            raise ConnectionError("no route to the server")

    message = r"^the dataset cannot be read any further \(no route to the server\): .* run the same command again"
    with pytest.raises(DataError, match=message) as error:
        cache_latents(Unreachable(), PixelLatents(), tmp_path, num_workers=num_workers, **OPTIONS)
    assert "\n" not in str(error.value)
