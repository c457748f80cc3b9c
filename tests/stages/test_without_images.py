"""Samples without an image: from rows to a snapshot, its checks, its report, its filters and its index files."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SettingError
from pipeline.shards.adopt import find_shards
from pipeline.shards.interchange import croissant_card
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.shards.verify import Verification, folder_problems
from pipeline.sources.source import Row, Slice
from pipeline.stages.filters.view import ShardView
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.settings import Renewal
from pipeline.stages.shard_tasks import Workers
from tests.jobs.conftest import Type, job  # noqa: F401  (the fixture that runs jobs)

HERE = Workers(processes_count=0)
OPTIONS = ShardOptions(number_sample_per_shard=4)


def signal(number: int) -> bytes:
    content = io.BytesIO()
    np.save(content, np.sin(np.arange(8, dtype=np.float32) * number))
    return content.getvalue()


@dataclass(frozen=True, kw_only=True)
class Waves:
    """Signals with captions; row 2 has no members, the last ones say what ``changed`` says."""

    kind: ClassVar[str] = "waves"
    has_captions: ClassVar[bool] = True
    media: ClassVar[tuple[str, ...]] = ()

    count: int = 7
    changed: int = 0

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        for start in range(0, self.count, rows_per_shard):
            count = min(rows_per_shard, self.count - start)
            digest = hashlib.sha256(f"{self} {start}".encode()).hexdigest()
            yield Slice(count=count, digest=digest, where={"start": start})

    def rows(self, piece: Slice) -> Iterator[Row]:
        for number in range(int(piece.where["start"]), int(piece.where["start"]) + piece.count):
            content = signal(number + (self.changed if number == 5 else 0))
            members = {} if number == 2 else {"npy": content}
            caption = f"a wave of number {number}"
            yield Row(url=f"wave://{number}", caption=caption, members=members, columns={"number": number})

    def schema(self) -> Mapping[str, type]:
        return {"number": int}


@pytest.fixture
def waves(tmp_path: Path) -> Snapshot:
    return refresh(Waves(), Folder(tmp_path / "waves"), OPTIONS, HERE)


def test_members_become_samples_and_nothing_is_fetched(waves: Snapshot) -> None:
    assert waves.fields == ("json", "npy", "txt") and waves.samples == 6 and waves.dropped == {"empty": 1}
    folder = Folder(waves.folder)
    with folder.open("00000.tar") as file:
        samples = list(iterate_tar(file, "00000.tar"))
    assert [sample.key for sample in samples] == ["000000", "000001", "000003"]
    np.testing.assert_array_equal(np.load(io.BytesIO(samples[1].fields["npy"])), np.load(io.BytesIO(signal(1))))
    described = json.loads(samples[1].fields["json"])
    assert described["number"] == 1 and described["status"] == "success" and "width" not in described
    table = pq.read_table(Path(waves.folder) / "00000.parquet")
    assert table["width"].null_count == 4 and "etag" not in table.column_names
    assert len(set(table["sha256"].drop_null().to_pylist())) == 3
    stats = json.loads(folder.read_bytes("00000_stats.json"))
    assert stats["count"] == 4 and stats["successes"] == 3


def test_a_restart_gives_the_same_bytes(waves: Snapshot, tmp_path: Path) -> None:
    again = Folder(tmp_path / "again")
    refresh(Waves(), again, OPTIONS, HERE)
    for name in ("00001_stats.json", "00001.tar"):
        again.delete(name)
    for snapshot in read_snapshot(again.uri).shards:
        assert snapshot.sha256 in {shard.sha256 for shard in waves.shards}
    assert refresh(Waves(), again, OPTIONS, HERE).digest == waves.digest
    for name in ("00000.tar", "00001.tar", "00001.parquet"):
        assert again.read_bytes(name) == Folder(waves.folder).read_bytes(name)


def test_a_renewal_sees_new_and_changed_members(waves: Snapshot) -> None:
    folder, renewal = Folder(waves.folder), Renewal(parent="latest")
    assert refresh(Waves(), folder, OPTIONS, HERE, renewal=renewal) == waves
    newer = refresh(Waves(count=8, changed=9), folder, OPTIONS, HERE, renewal=renewal)
    assert (newer.changes["changed"], newer.changes["added"], newer.samples) == (1, 1, 7)
    assert not list(Verification(snapshot=newer).problems(newer.shards[-1]))
    with pytest.raises(SettingError, match="without images"):
        refresh(Waves(), folder, OPTIONS, HERE, renewal=replace(renewal, revalidate="all"))


def test_filters_that_need_no_image_see_them(waves: Snapshot) -> None:
    view = ShardView(Folder(waves.folder), waves.shards[0])
    assert view.captions()[0] == "a wave of number 0" and len(set(view.digests())) == 3
    assert not view.sizes().any() and list(view.images()) == [None] * 3


def test_index_files_and_adoption(waves: Snapshot) -> None:
    card = croissant_card(waves, "0" * 64)
    assert [one["@id"] for one in card["recordSet"]] == ["json", "txt"]
    assert {"json-files", "npy-files", "txt-files"} <= {one["@id"] for one in card["distribution"]}
    wids = json.loads((Path(waves.folder) / "_snapshots" / waves.id / "wids.json").read_text())
    assert [one["nsamples"] for one in wids["shardlist"]] == [3, 3]
    assert not folder_problems(Folder(waves.folder), waves)


def test_tars_without_images_are_adopted(waves: Snapshot, tmp_path: Path) -> None:
    place = Folder(tmp_path / "found")
    for name in ("00000.tar", "00001.tar"):
        place.write_atomic(name, Folder(waves.folder).read_bytes(name))
    adoption = find_shards(place)
    found = adoption.publish([adoption.read_tar(number) for number in range(2)], None, skip_damaged=False)
    assert found.fields == waves.fields and found.samples == 6


def test_verify_dataset_finds_it_well(
    job: Type,  # noqa: F811
    waves: Snapshot,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert job("verify_dataset", "snapshot", waves.folder, "--decode", "--processes-count", "0") == 0
    assert "6 samples in 2 shards, all well" in capsys.readouterr().out


def test_report_dataset_shows_what_the_samples_have(
    job: Type,  # noqa: F811
    waves: Snapshot,
    tmp_path: Path,
) -> None:
    page = tmp_path / "page.html"
    words: list[Any] = ["--data", waves.folder, "--output", str(page), "--no-track", "--processes-count", "0"]
    assert job("report_dataset", "snapshot", *words) == 0
    shown = page.read_text()
    assert "npy" in shown and "a wave of number 6" in shown and "no images, sounds or videos to compare" in shown
    assert "<img" not in shown and "unreadable" not in shown
