"""Manifests as strangers write them: whatever is wrong in one is one sentence, and no name leads out of the folder."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse_json
from pipeline.errors import DataError, SnapshotError
from pipeline.shards import snapshot as module
from pipeline.shards.manifest import Shard, is_file_name
from pipeline.shards.selection import read_samples, read_selection, select, write_selection
from pipeline.shards.snapshot import SNAPSHOTS, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder

SHARDS: list[dict[str, Any]] = [
    {
        "name": "00000",
        "samples": 2,
        "bytes": 1024,
        "sha256": "a" * 64,
        "sidecars": json.dumps({"views": "b" * 64}),
        "selection": "",
        "stored": 2,
    }
]


def plant(place: Path, changes: dict[str, Any] | None = None, rows: list[dict[str, Any]] | None = None) -> Folder:
    """A folder whose one manifest fits its list of shards, as whoever computes the digest can make it."""
    table = pa.Table.from_pylist(SHARDS if rows is None else rows)
    parts = [Shard(**{**row, "sidecars": {}}) for row in SHARDS]
    digest = module._digest(tuple(parts))
    name = f"00001-{digest[:12]}"
    plain = {
        "id": name,
        "digest": digest,
        "created": "2026-01-01T00:00:00+00:00",
        "parent": None,
        "fields": ["jpg", "txt"],
        "card": None,
        "options": {},
        "rows": 2,
        "dropped": {},
        "changes": {},
        "samples": 2,
        **(changes or {}),
    }
    folder, content = Folder(place), BytesIO()
    pq.write_table(table, content)
    folder.folder(SNAPSHOTS).write_atomic(f"{name}.shards.parquet", content.getvalue())
    folder.folder(SNAPSHOTS).write_atomic(f"{name}.json", json.dumps(plain).encode())
    return folder


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": -1},
        {"rows": None},
        {"rows": "many"},
        {"rows": 2**60},
        {"rows": 1.5},
        {"dropped": {"dns": -1}},
        {"dropped": [1]},
        {"dropped": {"dns": None}},
        {"changes": {"added": "x"}},
        {"fields": 3},
        {"fields": [None]},
        {"card": 7},
        {"options": [1]},
        {"options": {"a": deep(200)}},
        {"parent": "../../other"},
        {"parent": "00009-abc"},
        {"parent": 5},
        {"id": "00002-abc"},
        {"digest": None},
        {"created": {}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_wrong_value_is_a_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = plant(tmp_path, changes)
    with pytest.raises(SnapshotError, match=r"\.json is not a whole snapshot \([^\n]{1,400}\)$"):
        read_snapshot(folder.uri)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../elsewhere"},
        {"name": "/etc/passwd"},
        {"name": "a/b"},
        {"name": ".."},
        {"name": ""},
        {"name": None},
        {"name": "a\0b"},
        {"name": "x" * 300},
        {"selection": "../../selection"},
        {"selection": "/tmp/x"},
        {"selection": None},
        {"sha256": "../../secret"},
        {"sha256": ""},
        {"sidecars": json.dumps({"../up": "b" * 64})},
        {"sidecars": json.dumps({"views": "../../b"})},
        {"sidecars": json.dumps({"views": 5})},
        {"sidecars": "[1]"},
        {"sidecars": "{"},
        {"sidecars": "[" * 50_000},
        {"samples": -1},
        {"samples": None},
        {"samples": 2.5},
        {"stored": 2**50},
        {"bytes": -5},
        {"bytes": "many"},
        {"more": 1},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_wrong_shard_is_a_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = plant(tmp_path, rows=[{**SHARDS[0], **change}])
    with pytest.raises(SnapshotError, match=r"\.json is not a whole snapshot \([^\n]{1,400}\)$"):
        read_snapshot(folder.uri)


def test_a_shard_twice_or_without_a_column_is_a_sentence(tmp_path: Path) -> None:
    lacking = {key: value for key, value in SHARDS[0].items() if key != "stored"}
    for rows in ([*SHARDS, *SHARDS], [lacking]):
        with pytest.raises(SnapshotError, match="is not a whole snapshot"):
            read_snapshot(plant(tmp_path, rows=rows).uri)


def test_the_digest_is_checked_after_the_values(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="the list of shards does not match its digest"):
        read_snapshot(plant(tmp_path).uri)  # the sidecars are not in its digest


@pytest.mark.parametrize(
    "text", [b"", b"[" * 100_000, b'{"a":' * 5_000, b"\xff\xfe", b"null", b'{"rows": 1' + b"0" * 5000]
)
def test_text_that_is_no_manifest_is_a_sentence(tmp_path: Path, text: bytes) -> None:
    folder = plant(tmp_path)
    (name,) = snapshot_ids(folder)
    folder.folder(SNAPSHOTS).write_atomic(f"{name}.json", text)
    with pytest.raises(SnapshotError, match="is not a whole snapshot"):
        read_snapshot(folder.uri)


def test_other_files_among_the_manifests_are_no_snapshots(tmp_path: Path) -> None:
    folder = plant(tmp_path)
    for name in ("notes.json", "zz.json", "00002-.json", "2-ab.json"):
        folder.folder(SNAPSHOTS).write_atomic(name, b"{}")
    assert len(snapshot_ids(folder)) == 1


def test_names_of_files_stay_as_other_tools_write_them() -> None:
    for name in ("00000", "cc3m-train-0000", "a.b", "with blank", "ü", "日本", "~x", "..a"):
        assert is_file_name(name)


@pytest.mark.parametrize("values", [[-1, 0], [1, 0], [0, 9], [0.5, 1.5], ["a", "b"], [None, 1]], ids=str)
def test_a_selection_that_is_none_is_a_sentence(tmp_path: Path, values: list[Any]) -> None:
    import hashlib

    content = BytesIO()
    column = pa.array(values, pa.int32()) if all(isinstance(one, int | None) for one in values) else pa.array(values)
    pq.write_table(pa.table({"index": column}), content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    Folder(tmp_path).folder("_selections").write_atomic(f"{digest}.parquet", content.getvalue())
    shard = Shard(name="00000", samples=2, bytes=1, sha256="0", selection=digest, stored=3)
    with pytest.raises(DataError, match="does not fit|is no selection"):
        read_selection(Folder(tmp_path), shard)


def test_claimed_samples_take_no_memory(make_snapshot: Any, tmp_path: Path) -> None:
    """A tar of three samples that a manifest claims to hold a billion, with and without a selection."""
    snapshot = make_snapshot((3,), tmp_path)
    folder, (shard,) = Folder(snapshot.folder), snapshot.shards
    kept = select(folder, shard, np.array([0, 2, 2]))
    assert [sample.key[-1] for sample in read_samples(folder, kept)] == ["0", "2", "2"]
    hides = write_selection(folder, np.array([10**9 - 1], np.int32))
    for claim in ({"samples": 10**9}, {"samples": 1, "selection": hides, "stored": 10**9}):
        huge = Shard(**{**vars(shard), "stored": 0, **claim})
        with pytest.raises(DataError, match="holds 3 samples, the snapshot says 1000000000"):
            list(read_samples(folder, huge))


def test_json_is_parsed_to_a_depth() -> None:
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert parse_json(json.dumps(deep(99))) == deep(99)
    for text in (json.dumps(deep(101)), "[" * 100_000, '{"a":' * 100_000, "", b"\xff"):
        with pytest.raises(ValueError):
            parse_json(text)
