"""Shards are complete or absent; snapshots are immutable and describe their content."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SidecarError, SnapshotError, StorageError
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import (
    FACTS,
    TAR_DIGEST,
    SidecarRows,
    Wanted,
    read_sidecar,
    read_sidecar_schema,
    write_sidecar,
)
from pipeline.shards.snapshot import Shard, publish, publish_shards, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.writer import ShardStats, ShardWriter, parquet_schema, read_stats

SCHEMA = parquet_schema({"caption": pa.string(), "url": pa.string()}, "sha256")


def row(key: str, status: str = "success", message: str | None = None) -> dict[str, Any]:
    reason = None if status == "success" else "http_4xx"
    return {"key": key, "url": f"http://x/{key}", "status": status, "error_message": message, "error_class": reason}


def write(folder: Folder, shard_id: int = 0, count: int = 3, text: bytes = b"hello") -> ShardStats:
    with ShardWriter(folder, shard_id, SCHEMA, unit=f"unit-{shard_id}") as writer:
        for index in range(count):
            key = f"{shard_id:05d}{index:04d}"
            writer.add(row(key), Sample(key, {"jpg": b"\xff\xd8", "txt": text}))
        writer.add(row("x", "failed_to_download", "HTTP Error 404: Not Found"), None)
        return writer.commit()


def test_a_committed_shard_has_the_three_files_of_img2dataset(tmp_path: Path) -> None:
    stats = write(Folder(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.parquet", "00000.tar", "00000_stats.json"]
    plain = json.loads((tmp_path / "00000_stats.json").read_text())
    assert (plain["count"], plain["successes"], plain["failed_to_download"], plain["failed_to_resize"]) == (4, 3, 1, 0)
    assert plain["status_dict"] == {"success": 3, "HTTP Error 404: Not Found": 1}
    assert plain["sha256"] == file_digest(tmp_path / "00000.tar")
    assert read_stats(Folder(tmp_path), "00000") == stats
    table = pq.read_table(tmp_path / "00000.parquet")
    assert table["status"].to_pylist() == ["success"] * 3 + ["failed_to_download"]


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(Folder(tmp_path), 0, SCHEMA, "unit") as writer:
        writer.add(row("0"), Sample("0", {"jpg": b"x"}))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_mark_is_gone_while_a_shard_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rerun that dies between tar and mark must not leave the old mark beside the new tar."""
    folder = Folder(tmp_path)
    write(folder)
    real = Folder.write_atomic

    def fail_on_parquet(self: Folder, name: str, content: bytes | Path) -> None:
        if name.endswith(".parquet"):
            raise StorageError("refused")
        real(self, name, content)

    monkeypatch.setattr(Folder, "write_atomic", fail_on_parquet)
    with pytest.raises(StorageError):
        write(folder, text=b"other")
    assert read_stats(folder, "00000") is None


def test_stats_of_another_tool_are_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "00000_stats.json").write_text('{"count": 3, "successes": 3}')
    with pytest.raises(SnapshotError, match="not written by clipmill"):
        read_stats(Folder(tmp_path), "00000")


def test_snapshots_name_parent_samples_and_drops(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    first = publish(folder, [write(folder, 0)], card="drawn", options={"image_size": 256})
    assert (first.samples, first.rows, first.dropped, first.parent) == (3, 4, {"http_4xx": 1}, None)
    assert first.fields == ("jpg", "txt") and first.id == "00000-" + first.digest[:12]
    second = publish(folder, [write(folder, 1), write(folder, 0)], card=None, options={})
    assert [shard.name for shard in second.shards] == ["00000", "00001"] and second.parent == first.id
    assert read_snapshot(str(tmp_path)) == second and read_snapshot(f"{tmp_path}@{first.id}") == first
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 3}


def test_publishing_the_same_again_adds_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    stats = write(folder)
    once = publish(folder, [stats], card=None, options={})
    assert publish(folder, [stats], card=None, options={}) == once and len(snapshot_ids(folder)) == 1


def test_equal_samples_have_equal_digests_anywhere(tmp_path: Path) -> None:
    here, there = Folder(tmp_path / "here"), Folder("memory://snapshots/there")
    digests = {publish(place, [write(place)], card=None, options={}).digest for place in (here, there)}
    assert len(digests) == 1


def test_missing_and_broken_snapshots_are_said_so(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with pytest.raises(SnapshotError, match="has no snapshot"):
        read_snapshot(str(tmp_path))
    with pytest.raises(SnapshotError, match="no row became a sample"):
        publish(folder, [write(folder, count=0)], card=None, options={})
    with pytest.raises(SnapshotError, match="no row became a sample: the source has no rows$"):
        publish(folder, [], card=None, options={})
    snapshot = publish(folder, [write(folder)], card=None, options={})
    with pytest.raises(SnapshotError, match="has no snapshot 00009-abc"):
        read_snapshot(f"{tmp_path}@00009-abc")
    manifest = tmp_path / "_snapshots" / f"{snapshot.id}.json"
    whole = manifest.read_text()
    for broken in (whole[:40], "{}", whole.replace(snapshot.digest, "0" * 64)):
        manifest.write_text(broken)
        with pytest.raises(SnapshotError):
            read_snapshot(str(tmp_path))
    manifest.unlink()
    with pytest.raises(SnapshotError, match="has no snapshot"):
        read_snapshot(str(tmp_path))


def test_a_shard_without_samples_is_not_offered_to_readers(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    snapshot = publish(folder, [write(folder, 0), write(folder, 1, count=0)], card=None, options={})
    assert [shard.name for shard in snapshot.shards] == ["00000"] and snapshot.rows == 5


@pytest.mark.parametrize("read", [read_sidecar, read_sidecar_schema])
def test_sidecars_are_tied_to_their_tar_and_maker(tmp_path: Path, read: Callable[..., Any]) -> None:
    folder = Folder(tmp_path)
    snapshot = publish(folder, [write(folder)], card=None, options={})
    shard = snapshot.shards[0]
    with pytest.raises(SidecarError, match="jobs/extract.py"):
        read(folder, shard, "regions", "jobs/extract.py")
    table = pa.table({"key": ["000000000"], "score": [0.5]})
    digest = write_sidecar(folder, shard, "regions", table, maker="model-1")
    assert digest == file_digest(tmp_path / "00000.regions.parquet")
    assert read_sidecar(folder, shard, "regions", "job", maker="model-1").to_pylist() == table.to_pylist()
    read(folder, shard, "regions", "job", maker="model-1")
    with pytest.raises(SidecarError, match="made by model-1"):
        read(folder, shard, "regions", "job", maker="model-2")
    other = Shard(name="00000", samples=3, bytes=1, sha256="0" * 64)
    with pytest.raises(SidecarError, match="another 00000.tar"):
        read(folder, other, "regions", "job")
    (tmp_path / "00000.regions.parquet").write_bytes(b"half")
    with pytest.raises(SidecarError, match="not parquet"):
        read(folder, shard, "regions", "job")
    with pytest.raises(SidecarError):
        write_sidecar(folder, shard, "regions", pa.table({"score": [1]}), maker="model-1")


@pytest.mark.parametrize("facts", [b"", b"[]", b"3", b"{" * 5, b"\xff", b'{"a":' * 20_000], ids=range(6))
def test_metadata_of_a_sidecar_that_are_none_are_a_sentence(tmp_path: Path, facts: bytes) -> None:
    folder = Folder(tmp_path)
    shard = Shard(name="00000", samples=1, bytes=1, sha256="0" * 64)
    table = pa.table({"key": ["0"]}).replace_schema_metadata({FACTS: facts})
    write_sidecar(folder, shard, "regions", table, maker="model-1")
    with pytest.raises(SidecarError, match=r"has unreadable metadata \(.*\); make it again with jobs/x.py") as error:
        SidecarRows(tmp_path / "00000.regions.parquet", shard, Wanted(name="regions", job="jobs/x.py"))
    assert "\n" not in str(error.value)


def test_a_sidecar_without_keys_is_a_sentence(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    shard = Shard(name="00000", samples=1, bytes=1, sha256="0" * 64)
    pq.write_table(
        pa.table({"score": [1]}).replace_schema_metadata({TAR_DIGEST: b"0" * 64, b"clipmill.maker": b"\xff"}),
        tmp_path / "00000.regions.parquet",
    )
    with pytest.raises(SidecarError, match="has no column `key`; make it again with jobs/x.py"):
        read_sidecar(folder, shard, "regions", "jobs/x.py")
    with pytest.raises(SidecarError, match="was made by"):
        read_sidecar(folder, shard, "regions", "jobs/x.py", maker="model-1")
    with pytest.raises(SidecarError, match="has no column `key`"):
        SidecarRows(tmp_path / "00000.regions.parquet", shard, Wanted(name="regions", job="jobs/x.py"))


@pytest.mark.parametrize("place", ["", "memory://sidecars"])
def test_what_a_sidecar_says_of_itself_is_read_without_its_rows(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three million bytes in chunks of their own, the end; nothing is left beside the file."""
    folder = Folder(place or tmp_path)
    shard = Shard(name="00000", samples=3, bytes=1, sha256="0" * 64)
    part = pa.table({"key": ["0"], "content": [np.random.default_rng(0).bytes(1_000_000)]})
    whole = pa.concat_tables([part, part, part]).replace_schema_metadata({FACTS: b'{"regions": 7}'})
    digest = write_sidecar(folder, shard, "regions", whole, maker="model-1")
    assert folder.names() == ["00000.regions.parquet"]
    assert digest == hashlib.sha256(folder.read_bytes("00000.regions.parquet")).hexdigest()
    assert read_sidecar(folder, shard, "regions", "job").equals(whole)
    monkeypatch.setattr(Folder, "read_bytes", lambda *_: pytest.fail("the whole file was read"))
    schema = read_sidecar_schema(folder, shard, "regions", "job", maker="model-1")
    assert schema.names == ["key", "content"] and schema.metadata[FACTS] == b'{"regions": 7}'


def test_sidecars_become_part_of_a_new_snapshot(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    bare = publish(folder, [write(folder)], card=None, options={})
    shard = Shard(**{**vars(bare.shards[0]), "sidecars": {"regions": "ab" * 32}})
    richer = publish_shards(folder, (shard,), fields=bare.fields, card=None, options={}, rows=4, dropped={})
    assert richer.digest != bare.digest and richer.parent == bare.id
    assert read_snapshot(str(tmp_path)).shards[0].sidecars == {"regions": "ab" * 32}
