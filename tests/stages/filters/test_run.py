"""A filter run publishes the samples of its reasons, the same after any interruption and on any machine."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError, SettingError, SnapshotError
from pipeline.shards.selection import read_samples
from pipeline.shards.sidecar import read_sidecar
from pipeline.shards.snapshot import Snapshot, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.stages.filters import metaclip
from pipeline.stages.filters.duplicates import ExactDuplicates
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.language import Language
from pipeline.stages.filters.length import Length
from pipeline.stages.filters.metaclip import MetaClip
from pipeline.stages.filters.perceptual import PerceptualDuplicates
from pipeline.stages.filters.run import filter_snapshot, read_duplicates, read_reasons
from pipeline.stages.filters.semantic import SemanticDuplicates
from pipeline.stages.filters.text import Text
from pipeline.stages.filters.view import ShardView
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
CAPTIONS = [f"a photograph of {number} red cars" if number % 4 else "no" for number in range(20)]


def looks(make_data: Any) -> list[bytes]:
    return [make_data.photograph(number % 7, *((96, 64) if number % 2 else (192, 128))) for number in range(20)]


@dataclass(frozen=True, kw_only=True)
class Breaks(Filter):
    """Passes everything, but cannot read one shard while a file says so."""

    name: ClassVar[str] = "breaks"
    flag: str

    def judge(self, view: ShardView, step: Step) -> Verdict:
        if os.path.exists(self.flag) and view.shard.name == "00002":
            raise DataError("00002.tar is broken")
        return Verdict({"never": np.zeros(len(view), bool)})


def captions_seen(snapshot: Snapshot) -> list[str]:
    folder = Folder(snapshot.folder)
    return [one.fields["txt"].decode() for shard in snapshot.shards for one in read_samples(folder, shard)]


def everything(tmp_path: Path) -> list[Filter]:
    entries = tmp_path / "entries.txt"
    entries.write_text("cars\nred cars\n1\n2\n3\n")
    return [
        Text(),
        Length(),
        Language(),
        ExactDuplicates(),
        PerceptualDuplicates(max_hamming=6),
        SemanticDuplicates(clusters=2, epsilon=0.01),
        MetaClip(entries=str(entries), entry_limit=3),
    ]


def embedded(make_data: Any, place: Path) -> Snapshot:
    snapshot = make_data(CAPTIONS, looks(make_data), per_shard=4, place=place)
    rows = np.random.default_rng(0).normal(size=(20, 8))
    make_data.add_embeddings(snapshot, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return snapshot


def test_the_snapshot_is_what_the_reasons_say(make_data: Any):
    parent = make_data(CAPTIONS, looks(make_data), per_shard=4)
    outcome = filter_snapshot(parent, [Length(), PerceptualDuplicates(max_hamming=6)], HERE)
    # Every fourth caption is short; of what is left, the first of each of the seven looks stays.
    first = {number % 7: number for number in reversed(range(20)) if number % 4}
    expected = [CAPTIONS[number] for number in sorted(first.values())]
    assert captions_seen(outcome.snapshot) == expected and captions_seen(parent) == CAPTIONS
    assert outcome.dropped == {"length.few_words": 5, "near_duplicates.near_duplicate": 8}
    assert outcome.funnel() == [
        ("", "", 0, 20),
        ("length", "few_words", 5, 15),
        ("near_duplicates", "near_duplicate", 8, 7),
    ]
    snapshot = read_snapshot(parent.folder)
    assert snapshot == outcome.snapshot and snapshot.parent == parent.id
    assert snapshot.dropped == {"dns": 2, **outcome.dropped} and snapshot.rows == parent.rows
    assert snapshot.changes == {"kept": 7, "removed": 13}
    assert [one["name"] for one in snapshot.options["filters"]] == ["length", "near_duplicates"]
    assert snapshot.options["filters"][0]["min_words"] == 3
    tables = [table for _, table in read_reasons(snapshot)]
    assert sum(table.num_rows for table in tables) == 20
    assert [table["key"][0].as_py() for table in tables] == ["0000000", "0000100", "0000200", "0000300", "0000400"]


def test_duplicates_are_told_with_what_is_kept(make_data: Any):
    images = [make_data.photograph(number) for number in (0, 1, 2, 0, 1, 0)]
    outcome = filter_snapshot(make_data(["a"] * 6, images, per_shard=2), [ExactDuplicates()], HERE)
    ((name, table),) = read_duplicates(outcome.snapshot)
    assert name == "exact_duplicates"
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == [(1, 1, 0, 0), (2, 0, 0, 1), (2, 1, 0, 0)]


def test_the_same_command_twice_writes_nothing(make_data: Any):
    parent = make_data(CAPTIONS, per_shard=4)
    first = filter_snapshot(parent, [Length()], HERE)
    for again in (read_snapshot(parent.folder), parent):
        second = filter_snapshot(again, [Length()], HERE)
        assert second.snapshot == first.snapshot and second.funnel() == first.funnel()
    assert len(snapshot_ids(Folder(parent.folder))) == 2
    other = filter_snapshot(parent, [Length(min_words=1, min_characters=0)], HERE)
    assert captions_seen(other.snapshot) == CAPTIONS and len(snapshot_ids(Folder(parent.folder))) == 3
    assert other.snapshot.parent == parent.id, "the one it was made from, not the latest"


def test_a_list_with_other_content_is_other_work(make_data: Any, tmp_path):
    parent, entries = make_data(CAPTIONS, per_shard=4), tmp_path / "list"
    counts = []
    for content in ("2\n", "2\n3\n"):
        entries.write_text(content)
        metaclip.read_entries.cache_clear()
        metaclip.automaton.cache_clear()
        counts.append(filter_snapshot(parent, [MetaClip(entries=str(entries))], HERE).snapshot.samples)
    assert counts == [1, 2]


def test_an_interrupted_run_goes_on(make_data: Any, tmp_path):
    undisturbed = filter_snapshot(embedded(make_data, tmp_path / "a"), everything(tmp_path), HERE).snapshot
    flag = tmp_path / "flag"
    flag.touch()
    parent = embedded(make_data, tmp_path / "b")
    filters = everything(tmp_path)
    disturbed = [*filters[:4], Breaks(flag=str(flag)), *filters[4:]]
    with pytest.raises(DataError, match="00002.tar is broken"):
        filter_snapshot(parent, disturbed, HERE)
    assert snapshot_ids(Folder(parent.folder)) == [parent.id]
    (work,) = (tmp_path / "b" / "_filters").iterdir()
    done = {path: path.stat().st_mtime_ns for path in work.rglob("*.parquet")}
    assert len(done) > 10
    flag.unlink()
    snapshot = filter_snapshot(parent, disturbed, HERE).snapshot
    assert snapshot.digest == undisturbed.digest
    assert all(path.stat().st_mtime_ns == then for path, then in done.items() if path.exists())
    # What was only on the way is gone, the reasons stay.
    assert not list(work.rglob("assigned/*")) and len(list(work.glob("reasons/*.parquet"))) == 5


def test_ray_gives_the_same(make_data: Any, tmp_path, ray_cluster):
    filters = [Length(), everything(tmp_path)[-1]]
    here = filter_snapshot(embedded(make_data, tmp_path / "a"), filters, HERE).snapshot
    by_ray = embedded(make_data, tmp_path / "b")
    there = filter_snapshot(by_ray, filters, Workers(processes_count=2)).snapshot
    assert there.digest == here.digest and dict(there.dropped) == dict(here.dropped)
    with pytest.raises(SettingError, match="languages"):
        filter_snapshot(by_ray, [Language(languages=("tlh",))], Workers(processes_count=2))


def test_a_broken_shard_is_named_through_ray(make_data: Any, ray_cluster):
    parent = make_data(CAPTIONS, per_shard=10, table=False)
    (Path(parent.folder) / "00001.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match="00001.tar"):
        filter_snapshot(parent, [Length()], Workers(processes_count=2))


def test_on_s3_it_is_the_same(make_data: Any, tmp_path, s3):
    import s3fs

    local = embedded(make_data, tmp_path / "a")
    s3fs.S3FileSystem().put(local.folder + "/", f"{s3}/set/", recursive=True)
    remote = filter_snapshot(read_snapshot(f"{s3}/set"), everything(tmp_path), HERE).snapshot
    assert remote.digest == filter_snapshot(local, everything(tmp_path), HERE).snapshot.digest
    assert captions_seen(remote) == captions_seen(read_snapshot(local.folder))
    assert sum(table.num_rows for _, table in read_reasons(remote)) == 20


def test_nothing_left_is_said(make_data: Any):
    parent = make_data(["a", "b"])
    with pytest.raises(SnapshotError, match="no sample is left.*few_words': 2"):
        filter_snapshot(parent, [Length()], HERE)
    assert snapshot_ids(Folder(parent.folder)) == [parent.id]


def test_shards_without_samples_leave_the_snapshot(make_data: Any):
    outcome = filter_snapshot(make_data(["no", "no", "three words here"], per_shard=2), [Length()], HERE)
    assert [shard.name for shard in outcome.snapshot.shards] == ["00001"]
    filtered_again = filter_snapshot(outcome.snapshot, [Text(), ExactDuplicates()], HERE)
    assert filtered_again.snapshot.samples == 1


def test_a_shard_may_be_empty_on_the_way(make_data: Any, tmp_path):
    captions = ["no", "no", "three red cars here", "two red cars here"]
    parent = make_data(captions, per_shard=2)
    make_data.add_embeddings(parent, np.eye(4))
    filters = [one for one in everything(tmp_path) if one.name != "language"]
    assert captions_seen(filter_snapshot(parent, filters, HERE).snapshot) == captions[2:]


def test_cleaned_captions_can_be_kept(make_data: Any):
    parent = make_data(["a &amp; b and more", "no", "schÃ¶ne  Autos hier"], per_shard=3)
    snapshot = filter_snapshot(parent, [Length()], HERE, captions_sidecar=True).snapshot
    (shard,) = snapshot.shards
    table = read_sidecar(Folder(snapshot.folder), shard, "captions", "this test")
    assert table["caption"].to_pylist() == ["a & b and more", "no", "schöne Autos hier"]
    assert set(shard.sidecars) == {"captions"}
    assert captions_seen(snapshot) == ["a &amp; b and more", "schÃ¶ne  Autos hier"]


def test_a_parquet_of_other_keys_than_the_tar_is_refused(make_data: Any):
    parent = make_data(["a"] * 4, per_shard=4)
    path = Path(parent.folder) / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(table.num_rows))[::-1]), path)
    with pytest.raises(DataError, match="lists other keys"):
        filter_snapshot(parent, [ExactDuplicates()], HERE)


@pytest.mark.parametrize("steps", [[], [Length(), Length(min_words=5)]])
def test_no_filter_and_twice_the_same_are_refused(steps, make_data: Any):
    with pytest.raises(SettingError, match="^steps:"):
        filter_snapshot(make_data(["a"]), steps, HERE)


def test_snapshots_without_filters_have_no_reasons(make_data: Any):
    with pytest.raises(SnapshotError, match="jobs/filter_dataset.py"):
        list(read_reasons(make_data(["a"])))
    assert list(read_duplicates(make_data(["a"]))) == []


@pytest.mark.parametrize(
    "options",
    [
        {"filters_run": "../../elsewhere"},
        {"filters_run": "/etc"},
        {"filters_run": 5},
        {"filters_parent": "../other@00000-ab"},
        {"filters_parent": None},
        {"filters": [{"name": "../../up"}]},
        {"filters": [5]},
        {"filters": 5},
    ],
    ids=str,
)
def test_a_manifest_does_not_lead_the_reasons_elsewhere(make_data: Any, options: dict[str, Any]):
    snapshot = filter_snapshot(make_data(CAPTIONS), [Length()], HERE).snapshot
    strange = replace(snapshot, options={**snapshot.options, **options})
    with pytest.raises(SnapshotError, match="was not made by filters|does not say which|names no filters"):
        list(read_reasons(strange)), list(read_duplicates(strange))


@pytest.mark.parametrize("what", ["columns", "rows", "negative", "null", "text", "file"])
def test_a_table_of_reasons_fits_its_shard(make_data: Any, what: str):
    snapshot = filter_snapshot(make_data(CAPTIONS), [Length()], HERE).snapshot
    (path,) = (Path(snapshot.folder) / "_filters").rglob("reasons/000000.parquet")
    table = pq.read_table(path)
    times = {"negative": pa.array([1, -1, 1], pa.int32()), "null": pa.array([1, None, 1], pa.int32())}
    times["text"] = pa.array(["1", "x", "1"])
    if what in times:
        table = table.set_column(2, "times", times[what])
    pq.write_table({"columns": table.select(["key"]), "rows": table.slice(1)}.get(what, table), path)
    if what == "file":
        path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is missing or damaged|does not fit"):
        list(read_reasons(snapshot))


def test_options_are_plain_json(make_data: Any, tmp_path):
    snapshot = filter_snapshot(embedded(make_data, tmp_path / "a"), everything(tmp_path), HERE).snapshot
    assert json.loads(json.dumps(snapshot.options)) == snapshot.options
