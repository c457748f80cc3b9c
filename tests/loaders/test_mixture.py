"""Mixtures of snapshots: proportions, epochs and positions, counted one by one."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, SettingError, SnapshotError
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.mixture import MixedOrder, Mixture, divided, make_order, places, read_data
from pipeline.loaders.readers import TextReader
from pipeline.shards.snapshot import Snapshot

MakeSnapshot = Callable[..., Snapshot]
SETTINGS: dict[str, Any] = {"seed": 3, "lanes": 4, "shuffle_block": 16}


@pytest.fixture
def mixture(make_snapshot: MakeSnapshot, tmp_path: Path) -> Mixture:
    large = make_snapshot((7, 5, 8), folder=tmp_path / "large")
    small = make_snapshot((3, 2), folder=tmp_path / "small")
    mixed = read_data(f"{large.folder}=3,{small.folder}=1")
    assert isinstance(mixed, Mixture)
    return mixed


def order_of(mixture: Mixture, batch_size: int = 8) -> MixedOrder:
    order = make_order(mixture, batch_size=batch_size, **SETTINGS)
    assert isinstance(order, MixedOrder)
    return order


def test_every_batch_has_the_proportions_and_every_epoch_each_sample_once(mixture: Mixture) -> None:
    order = order_of(mixture)
    seen: dict[str, Counter[tuple[int, int]]] = {"large": Counter(), "small": Counter()}
    for step in range(40):
        batch = order.batch(step)
        assert len(batch) == 8 and (batch[:, 1] < 20).sum() == 6  # three of four
        for epoch, number in batch.tolist():
            seen["large" if number < 20 else "small"][epoch, number] += 1
    for name, numbers, rows in (("large", range(20), 240), ("small", range(20, 25), 80)):
        assert seen[name].total() == rows and max(seen[name].values()) == 1
        whole = min(epoch for epoch in range(99) if any((epoch, number) not in seen[name] for number in numbers))
        assert whole == rows // 2 // -(-len(numbers) // 2)  # two lanes: the longer one ends its epochs later


def test_ranks_divide_the_batch_of_one_process_and_each_gets_its_share(mixture: Mixture) -> None:
    order = order_of(mixture)
    for step in (0, 1, 17):
        whole = order.batch(step)
        for world in (2, 4):
            parts = [order.batch(step, rank, world) for rank in range(world)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)
            shares = [int((part[:, 1] < 20).sum()) for part in parts]
            assert max(shares) - min(shares) <= 1
    with pytest.raises(SettingError, match="batch_size"):
        order.batch(0, 0, 3)


def test_an_epoch_is_as_many_samples_as_there_are(mixture: Mixture) -> None:
    assert order_of(mixture).steps(1) == 4 and order_of(mixture).steps(2.0) == 7  # 25 and 50 in batches of 8


@pytest.mark.parametrize(
    ("batch", "weights", "lanes", "expected"),
    [
        (8, (3, 1), 4, [6, 2]),
        (4096, (0.7, 0.3), 32, [2864, 1232]),  # multiples of 16: of 32, 1216 would be over a percent from 1228.8
        (100, (1, 1, 1), 1, [34, 33, 33]),
        (10, (0.5, 0.26, 0.24), 1, [5, 3, 2]),
        (256, (0.99, 0.01), 32, [253, 3]),
    ],
)
def test_a_batch_is_divided_by_largest_remainders(
    batch: int, weights: tuple[float, ...], lanes: int, expected: list[int]
) -> None:
    assert divided(batch, weights, lanes) == expected


def test_a_weight_below_one_sample_is_refused() -> None:
    with pytest.raises(SettingError, match="at least one sample in a batch of 8"):
        divided(8, (1.0, 0.01), 4)


def test_batches_read_from_all_parts(mixture: Mixture) -> None:
    """The captions that come are those of the samples that the order names."""

    def letters(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[int(text.split()[-1])] for text in texts])

    order, reader = order_of(mixture), TextReader(tokenizer=letters)
    config = LoaderConfig(loader_workers=0)
    got = [
        batch["text"][:, 0].tolist()
        for batch in training_batches(mixture, [reader], order, steps=range(5), config=config)
    ]
    # A caption ends in the number of the sample in its own snapshot.
    expected = [
        [number if number < 20 else number - 20 for _, number in order.batch(step).tolist()] for step in range(5)
    ]
    assert got == expected
    later = training_batches(mixture, [reader], order, steps=range(3, 5), config=config)
    assert [batch["text"][:, 0].tolist() for batch in later] == expected[3:]


def test_a_part_without_one_readable_sample_is_named(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    good = make_snapshot((4,), folder=tmp_path / "good")
    bad = make_snapshot((2,), folder=tmp_path / "bad", spoil={0: {"txt": b"x"}, 1: {"txt": b"x"}})
    mixed = read_data(f"{good.folder}=1,{bad.folder}=1")

    class Images(TextReader):
        fields = ("image",)

        def read(self, sample: Any, at: Any) -> Any:
            from pipeline.loaders.samples import UnreadableSample

            if sample.image() is None:
                raise UnreadableSample("no image")
            return {"text": "0"}

    batches = training_batches(
        mixed,
        [Images(tokenizer=lambda texts: torch.zeros(len(texts), 1))],
        make_order(mixed, batch_size=4, **SETTINGS),
        steps=range(1),
        config=LoaderConfig(loader_workers=0),
    )
    with pytest.raises(DataError, match="bad/00000.tar: no sample is readable"):
        next(batches)


def test_one_folder_is_a_snapshot_and_needs_no_weight(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    alone = make_snapshot((4,), folder=tmp_path / "a=b")
    assert read_data(alone.folder) == alone == read_data(alone.uri)


def test_weights_and_contents_make_the_digest(mixture: Mixture) -> None:
    again = read_data(mixture.uri)
    assert isinstance(again, Mixture) and again.digest == mixture.digest and again.uri == mixture.uri
    other = Mixture(mixture.parts, (1.0, 1.0))
    assert other.digest != mixture.digest != Mixture(mixture.parts[::-1], mixture.weights).digest


@pytest.mark.parametrize(
    "data", ["a,b", "a=1,b", "a=0,b=1", "a=-1,b=1", "a=1,b=x", "a=1,b=nan", "a=1,b=inf", "a=1,a=2", "=1,b=1"]
)
def test_wrong_mixtures_are_one_sentence(data: str) -> None:
    with pytest.raises(SettingError, match="data"):
        places(data)


def test_a_part_that_is_missing_is_named(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    there = make_snapshot((4,), folder=tmp_path / "there")
    with pytest.raises(SnapshotError, match="nowhere"):
        read_data(f"{there.folder}=1,{tmp_path}/nowhere=1")


def test_parts_with_differing_fields_have_those_of_all(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    from dataclasses import replace

    first = make_snapshot((4,), folder=tmp_path / "first")
    bare = replace(make_snapshot((4,), folder=tmp_path / "bare"), fields=("jpg",))
    mixed = Mixture((first, bare), (1.0, 1.0))
    assert mixed.fields == ("jpg",)
    with pytest.raises(DataError, match="has no field txt"):
        next(
            training_batches(
                mixed,
                [TextReader(tokenizer=lambda texts: torch.zeros(len(texts), 1))],
                make_order(mixed, batch_size=4, **SETTINGS),
                steps=range(1),
                config=LoaderConfig(loader_workers=0),
            )
        )
