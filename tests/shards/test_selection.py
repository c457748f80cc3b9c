"""Selections against plain lists of keys."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.loaders.samples import Samples
from pipeline.shards.sample import Sample
from pipeline.shards.selection import SELECTIONS, read_samples, read_selection, select, write_selection
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarWriter

KEYS = [f"{number:09d}" for number in range(10)]


def make_shard(folder: Path, name: str = "00000") -> Shard:
    with open(folder / f"{name}.tar", "wb") as file:
        writer = TarWriter(file)
        for key in KEYS:
            writer.write(Sample(key, {"txt": key.encode()}))
        writer.close()
    content = (folder / f"{name}.tar").read_bytes()
    return Shard(name=name, samples=len(KEYS), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def publish(folder: Path, *shards: Shard) -> Snapshot:
    return publish_shards(Folder(folder), shards, fields=("txt",), card=None, options={}, rows=10, dropped={})


def keys(folder: Path, shard: Shard) -> list[str]:
    return [sample.key for sample in read_samples(Folder(folder), shard)]


def test_selections_compose_and_read_as_lists_do(tmp_path: Path) -> None:
    folder, shard = Folder(tmp_path), make_shard(tmp_path)
    mask = np.array([True, False] * 5)
    even = select(folder, shard, mask)
    assert (even.samples, even.stored, shard.stored) == (5, 10, 10)
    assert keys(tmp_path, shard) == KEYS and keys(tmp_path, even) == KEYS[::2]
    some = select(folder, even, np.array([1, 1, 4]))  # positions among what is visible, one of them twice
    expected = [KEYS[2], KEYS[2], KEYS[8]]
    assert keys(tmp_path, some) == expected
    samples = Samples(publish(tmp_path, some))
    assert [samples[number].key for number in range(3)] == expected
    assert [sample.key for sample in samples.from_here(2)] == [KEYS[8], KEYS[2], KEYS[2]]


def test_numbers_run_through_shards_with_and_without_selections(tmp_path: Path) -> None:
    first = select(Folder(tmp_path), make_shard(tmp_path, "00000"), np.array([7, 9]))
    nothing = select(Folder(tmp_path), make_shard(tmp_path, "00001"), np.zeros(10, bool))
    last = make_shard(tmp_path, "00002")
    samples = Samples(publish(tmp_path, first, nothing, last))
    assert len(samples) == 12
    assert [samples[number].key for number in range(12)] == [KEYS[7], KEYS[9], *KEYS]


def test_a_selection_of_everything_is_none(tmp_path: Path) -> None:
    shard = make_shard(tmp_path)
    assert select(Folder(tmp_path), shard, np.ones(10, bool)) == shard
    assert not (tmp_path / SELECTIONS).exists()


def test_a_selection_makes_another_snapshot_and_survives_the_manifest(tmp_path: Path) -> None:
    shard = make_shard(tmp_path)
    whole = publish(tmp_path, shard)
    part = publish(tmp_path, select(Folder(tmp_path), shard, np.arange(3)))
    assert part.digest != whole.digest and part.parent == whole.id and part.samples == 3
    assert read_snapshot(str(tmp_path)) == part and read_snapshot(whole.uri) == whole


@pytest.mark.parametrize("keep", [np.ones(9, bool), np.array([3, 2]), np.array([10]), np.array([-1, 3])])
def test_bad_positions_are_refused(tmp_path: Path, keep: np.ndarray) -> None:
    with pytest.raises(ValueError, match="00000.tar"):
        select(Folder(tmp_path), make_shard(tmp_path), keep)


def test_missing_damaged_and_foreign_selections(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    shard = select(folder, make_shard(tmp_path), np.array([1, 2]))
    file = tmp_path / SELECTIONS / f"{shard.selection}.parquet"
    with pytest.raises(DataError, match="does not fit"):
        read_selection(folder, replace(shard, samples=3))
    with pytest.raises(DataError, match="does not fit"):
        read_selection(folder, replace(shard, samples=1, selection=write_selection(folder, np.array([10], np.int32))))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="damaged"):
        read_selection(folder, shard)
    file.unlink()
    with pytest.raises(DataError, match="missing"):
        list(read_samples(folder, shard))


def test_a_tar_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    shard = make_shard(tmp_path)
    (tmp_path / shard.tar).unlink()
    with pytest.raises(DataError, match=r"00000\.tar is missing"):
        keys(tmp_path, shard)
