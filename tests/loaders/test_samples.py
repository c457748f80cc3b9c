"""Random access to a snapshot, local and remote, whole and damaged."""

import multiprocessing
import pickle
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import DataError
from pipeline.loaders.cache import FileCache
from pipeline.loaders.samples import Samples, check_fields
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder


def test_samples_are_numbered_through_the_shards(make_snapshot) -> None:
    samples = Samples(make_snapshot((3, 1, 4)), open_shards=1)
    assert len(samples) == 8
    for number in (7, 0, 3, 2, 4):
        assert f'"number": {number}}}'.encode() in samples[number].fields["json"]
    for number in (-1, 8):
        with pytest.raises(IndexError):
            samples[number]


def test_from_here_goes_round_the_shard(make_snapshot) -> None:
    samples = Samples(make_snapshot((3, 4)))
    assert [made.key for made in samples.from_here(5)] == ["0000102", "0000103", "0000100", "0000101"]


def test_pickles_without_its_maps(make_snapshot) -> None:
    samples = Samples(make_snapshot((3, 4)))
    key = samples[5].key
    assert pickle.loads(pickle.dumps(samples))[5].key == key


def test_missing_fields_are_named(make_snapshot) -> None:
    snapshot = make_snapshot((2,))
    check_fields(snapshot, ["image", "txt"])
    with pytest.raises(DataError, match=r"no field mask\.png; its samples have: jpg, json, txt"):
        check_fields(snapshot, ["image", "mask.png"])


def test_a_shard_that_changed_is_refused(make_snapshot, tmp_path: Path) -> None:
    snapshot = make_snapshot((3, 4), folder=tmp_path)
    with open(tmp_path / "00001.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"00001\.tar has \d+ bytes"):
        Samples(snapshot)[5]
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(DataError, match="is missing"):
        Samples(snapshot)[5]


@pytest.fixture
def remote(make_snapshot, tmp_path: Path, request: pytest.FixtureRequest) -> Snapshot:
    """The same snapshot in fsspec's store in memory."""
    make_snapshot((3, 4), folder=tmp_path / "made")
    store, place = fsspec.filesystem("memory"), f"/{request.node.name}"
    store.put(str(tmp_path / "made"), place, recursive=True)
    return read_snapshot(f"memory:/{place}")


def test_remote_shards_are_fetched_once(remote: Snapshot, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache")
    assert Samples(remote, cache)[5].key == "0000102"
    stored = [path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]
    assert stored == [f"{remote.shards[1].sha256}.tar"]
    Folder(remote.folder).delete("00001.tar")
    assert Samples(remote, cache)[6].key == "0000103"
    with pytest.raises(DataError, match="is missing"):
        Samples(remote, FileCache(tmp_path / "other"))[5]


def test_damaged_remote_shards_are_refused(remote: Snapshot, tmp_path: Path) -> None:
    content = bytearray(Folder(remote.folder).read_bytes("00000.tar"))
    content[1000] ^= 1
    Folder(remote.folder).write_atomic("00000.tar", bytes(content))
    with pytest.raises(DataError, match=r"00000\.tar is damaged"):
        Samples(remote, FileCache(tmp_path / "cache"))[0]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]


def test_the_cache_keeps_to_its_limit(remote: Snapshot, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", limit_bytes=remote.shards[1].bytes + 10)
    samples = Samples(remote, cache)
    assert samples[0].key == "0000000" and samples[5].key == "0000102"
    stored = [path.stem for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]
    assert stored == [remote.shards[1].sha256]
    assert samples[1].key == "0000001"  # still mapped


def _fetch(place: Path, source: Path, results: "multiprocessing.Queue[str]") -> None:
    folder = Folder(source)
    folder.is_local = False  # as if it were remote
    results.put(str(FileCache(place).fetch(folder, "00000.tar")))


def test_processes_share_the_cache(make_snapshot, tmp_path: Path) -> None:
    make_snapshot((3,), folder=tmp_path / "made")
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=_fetch, args=(tmp_path / "cache", tmp_path / "made", results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    paths = {results.get(timeout=30) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == (tmp_path / "made/00000.tar").read_bytes()
