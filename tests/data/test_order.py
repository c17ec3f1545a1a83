import itertools

import numpy as np
import pytest

from diffusers_srepa.data.order import BatchLayout, GlobalBatchSampler, SampleKey, is_flipped, keyed_permutation
from diffusers_srepa.errors import ConfigurationError


def global_batches(num_samples, global_batch_size, micro_batch_size, num_processes, steps, seed=3, start_step=0):
    """{step: {position: index}} collected over all processes."""
    batches: dict[int, dict[int, int]] = {}
    for process in range(num_processes):
        sampler = GlobalBatchSampler(
            num_samples,
            global_batch_size,
            micro_batch_size,
            seed,
            process_index=process,
            num_processes=num_processes,
            start_step=start_step,
            num_steps=steps,
        )
        for key in itertools.chain.from_iterable(sampler):
            assert key.position not in batches.setdefault(key.step, {})
            batches[key.step][key.position] = key.index
    return batches


@pytest.mark.parametrize(("micro_batch_size", "num_processes"), [(4, 2), (4, 1), (2, 2), (1, 8), (1, 1)])
def test_the_global_batches_do_not_depend_on_how_they_are_divided(micro_batch_size, num_processes):
    one_process = global_batches(50, 8, 8, 1, steps=14)
    assert global_batches(50, 8, micro_batch_size, num_processes, steps=14) == one_process
    assert sorted(one_process) == list(range(14))
    assert all(sorted(batch) == list(range(8)) for batch in one_process.values())


def test_places_in_the_global_batch_by_hand():
    # m * P * b + r * b + [0, b) with P = 2, b = 2.
    layout = BatchLayout(global_batch_size=8, micro_batch_size=2, process_index=1, num_processes=2)
    assert [list(layout.positions(m)) for m in range(layout.num_micro_batches)] == [[2, 3], [6, 7]]
    assert layout.samples_per_step == 4


def test_an_epoch_shows_no_row_twice_and_the_next_one_has_another_order():
    batches = global_batches(19, 4, 4, 1, steps=8)
    epochs = [[index for step in range(first, first + 4) for index in batches[step].values()] for first in (0, 4)]
    for epoch in epochs:
        assert len(set(epoch)) == 16
        assert set(epoch) <= set(range(19))
    assert epochs[0] != epochs[1]


def test_the_seed_decides_the_order():
    assert global_batches(19, 4, 4, 1, steps=2, seed=1) != global_batches(19, 4, 4, 1, steps=2, seed=2)


def test_a_resumed_sampler_goes_on_where_the_first_one_was():
    whole = list(GlobalBatchSampler(19, 4, 2, seed=0, num_steps=11))
    resumed = list(GlobalBatchSampler(19, 4, 2, seed=0, start_step=5, num_steps=6))
    assert resumed == whole[5 * 2 :]


def test_a_resume_late_in_a_run_is_immediate():
    sampler = GlobalBatchSampler(1000, 10, 10, seed=0, start_step=10**9)
    assert next(iter(sampler))[0].step == 10**9


def test_items_are_sample_keys_of_plain_integers():
    key = next(iter(GlobalBatchSampler(4, 2, 2, seed=0)))[1]
    assert isinstance(key, SampleKey)
    assert [type(part) for part in key] == [int, int, int]
    assert (key.step, key.position) == (0, 1)


def test_permutations_are_frozen():
    # A change of these numbers breaks the resume of every run that exists.
    assert keyed_permutation(8, 0, "order", 0).tolist() == [4, 0, 2, 5, 6, 3, 7, 1]
    assert sorted(keyed_permutation(1000, 1, "order", 2).tolist()) == list(range(1000))


def test_half_of_the_samples_are_flipped():
    flips = np.array([is_flipped(0, step, position) for step in range(20) for position in range(50)])
    assert 400 < flips.sum() < 600
    assert is_flipped(0, 3, 4) == is_flipped(0, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 7}, r"7 rows, fewer than one global batch of 8.*`global_batch_size`"),
        ({"global_batch_size": 9}, r"`global_batch_size` is 9.*`micro_batch_size`"),
        ({"micro_batch_size": 3}, r"no multiple of 6"),
        ({"micro_batch_size": 0}, "`micro_batch_size` is 0"),
        ({"global_batch_size": 0}, "`global_batch_size` is 0"),
        ({"process_index": 2}, "`process_index` is 2"),
        ({"start_step": -1}, "`start_step` is -1"),
        ({"num_steps": -1}, "`num_steps` is -1"),
    ],
)
def test_what_cannot_be_divided_is_refused(arguments, message):
    valid = {"num_samples": 50, "global_batch_size": 8, "micro_batch_size": 2, "seed": 0, "num_processes": 2}
    with pytest.raises(ConfigurationError, match=message):
        GlobalBatchSampler(**valid | arguments)
