"""The order of samples against brute force."""

from collections import Counter

import numpy as np
import pytest

from pipeline.errors import SettingError
from pipeline.loaders.order import Order, permutation, random_bits

SIZES = [7, 1, 13, 0, 5, 11, 4, 20, 9, 3]  # 73 samples, an empty shard among them


def order(**settings: object) -> Order:
    plain = {"seed": 3, "batch_size": 12, "lanes": 4, "shuffle_block": 5, **settings}
    return Order(SIZES, **plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle_block", [1, 5, 100])
@pytest.mark.parametrize(("batch_size", "lanes"), [(12, 4), (12, 32), (5, 3), (73, 1), (100, 10), (1, 1), (96, 96)])
def test_every_sample_is_seen_once_in_every_epoch(batch_size: int, lanes: int, shuffle_block: int) -> None:
    made = order(batch_size=batch_size, lanes=lanes, shuffle_block=shuffle_block)
    rows = np.concatenate([made.batch(step) for step in range(made.steps(4))])
    seen = Counter(map(tuple, rows.tolist()))
    for epoch in range(4):
        assert [seen[epoch, number] for number in range(73)] == [1] * 73


def test_an_order_has_no_more_steps_than_the_epochs_need() -> None:
    assert order(batch_size=10, lanes=2).steps(1) == 8  # 37 samples in the longer lane, 5 a step
    assert order(batch_size=12).steps(1) == 7
    assert order(batch_size=12).steps(0.5) == 4


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_cut_the_same_global_batch(world: int) -> None:
    made = order()
    for step in (0, 5, 6, 7, 40):
        whole = made.batch(step)
        pieces = [made.batch(step, rank, world) for rank in range(world)]
        assert whole.shape == (12, 2)
        assert np.array_equal(np.concatenate(pieces), whole)


def test_a_new_process_continues_where_another_stopped() -> None:
    running = order()
    expected = [running.batch(step).tolist() for step in range(30)]
    fresh = order()
    assert [fresh.batch(step).tolist() for step in range(17, 30)] == expected[17:]


def test_seeds_and_epochs_shuffle_differently() -> None:
    same, other = order(lanes=1, batch_size=73), order(lanes=1, batch_size=73, seed=4)
    assert same.batch(0).tolist() == order(lanes=1, batch_size=73).batch(0).tolist()
    assert same.batch(0)[:, 1].tolist() != other.batch(0)[:, 1].tolist()
    assert same.batch(0)[:, 1].tolist() != same.batch(1)[:, 1].tolist()


def test_lanes_read_few_shards_at_a_time() -> None:
    """One lane of one block: the samples of a step come from neighbouring shards of the epoch's row."""
    made = Order([100] * 50, seed=0, batch_size=8, lanes=8, shuffle_block=50)
    touched = {int(number) // 100 for step in range(50) for _, number in made.batch(step, rank=3, world=8)}
    assert len(touched) <= 2


def test_shuffling_mixes_within_a_block() -> None:
    places = permutation(0, 2, 0, 0, 10_000)
    assert sorted(places.tolist()) == list(range(10_000))
    assert abs(np.corrcoef(places, np.arange(10_000))[0, 1]) < 0.05
    first = Counter(int(permutation(seed, 2, 0, 0, 4)[0]) for seed in range(4000))
    assert all(850 < first[value] < 1150 for value in range(4))


def test_the_order_is_the_same_in_every_version() -> None:
    """Frozen: a change here, in ours or in NumPy, would spoil the resume of every run under way."""
    assert permutation(7, 1, 2, 3, 12).tolist() == [2, 3, 6, 8, 5, 1, 7, 4, 11, 9, 10, 0]
    frozen = Order([5, 4, 6], seed=11, batch_size=6, lanes=2, shuffle_block=4)
    assert frozen.batch(3).tolist() == [[1, 10], [1, 11], [1, 13], [1, 8], [1, 7], [1, 0]]
    assert int(random_bits(7, 2, 1, 5, 1)[0]) == int(random_bits(7, 2, 1, 5, 9)[0])


def test_lanes_are_reduced_to_what_divides_the_batch() -> None:
    assert Order([1000], seed=0, batch_size=48, lanes=32).lanes == 16
    assert Order([3], seed=0, batch_size=8, lanes=32).lanes == 2
    assert Order([1], seed=0, batch_size=8).batch(0).tolist() == [[epoch, 0] for epoch in range(8)]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"lanes": 0}, "lanes"),
        ({"shuffle_block": 0}, "shuffle_block"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, int], field: str) -> None:
    with pytest.raises(SettingError) as caught:
        order(**settings)
    assert caught.value.field == field


def test_workers_must_divide_the_batch() -> None:
    with pytest.raises(SettingError, match="multiple of the 5 workers"):
        order().batch(0, 0, 5)
