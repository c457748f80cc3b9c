"""Our engine compared with the real img2dataset: the same layout on the same urls; its engine under our rules."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError, SnapshotError
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarShard
from pipeline.sources.urls import UrlTable
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

pytest.importorskip("imghdr", reason="img2dataset does not import on Python 3.13")

from pipeline.stages.refresh.img2dataset_engine import guarded_opener, refresh_with_img2dataset  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # img2dataset itself gives many warnings

OPTIONS = ShardOptions(
    media=MediaOptions(image=ImageOptions(image_size=64, exact=True)),
    downloads=DownloadOptions(allow_hosts=("127.0.0.1",), timeout=5.0, thread_count=8),
    number_sample_per_shard=5,
)


def image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (15, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((200, 150), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture
def table(tmp_path: Path, serve: Any) -> UrlTable:
    server = serve({f"{number}.jpg": image(number) for number in range(8)} | {"bad.jpg": b"not an image"})
    names = [*range(8), "bad", "missing"]
    frame = pandas.DataFrame(
        {
            "url": [f"{server.url}/{name}.jpg" for name in names],
            "caption": [f"number {name}" for name in names],
            "similarity": [index / 4 for index in range(10)],
        }
    )
    frame.to_parquet(tmp_path / "list.parquet")
    return UrlTable(
        url_list=str(tmp_path / "list.parquet"), caption_col="caption", save_additional_columns=("similarity",)
    )


def test_the_layout_is_img2datasets(table: UrlTable, tmp_path: Path, ray_cluster: Any) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    refresh(table, Folder(ours), OPTIONS, Workers(processes_count=0))
    snapshot = refresh_with_img2dataset(table, Folder(theirs), OPTIONS, Workers())
    assert snapshot.samples == 8 == read_snapshot(str(ours)).samples
    for shard in ("00000", "00001"):
        mine, other = TarShard(ours / f"{shard}.tar"), TarShard(theirs / f"{shard}.tar")
        order = {key: index for index, key in enumerate(other.keys)}
        assert sorted(mine.keys) == sorted(other.keys)
        for index, key in enumerate(mine.keys):
            compare(mine[index].fields, other[order[key]].fields)
        compare_tables(pq.read_table(ours / f"{shard}.parquet"), pq.read_table(theirs / f"{shard}.parquet"))
        stats = [json.loads((place / f"{shard}_stats.json").read_text()) for place in (theirs, ours)]
        assert list(stats[0]) == list(stats[1])[: len(stats[0])]
        for name in ("count", "successes", "failed_to_download", "failed_to_resize"):
            assert stats[0][name] == stats[1][name]


def compare(mine: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert sorted(mine) == sorted(other) and mine["txt"] == other["txt"]
    theirs = json.loads(other["json"])
    assert {name: json.loads(mine["json"])[name] for name in theirs} == theirs
    pixels = [np.asarray(Image.open(io.BytesIO(one["jpg"])), dtype=float) for one in (mine, other)]
    assert pixels[0].shape == pixels[1].shape
    # Two JPEG codings of the same pixels differ by a few levels; a shifted or differently cropped one by dozens.
    assert np.sqrt(np.mean((pixels[0] - pixels[1]) ** 2)) < 2.5


def compare_tables(mine: Any, other: Any) -> None:
    names = other.column_names
    assert set(names) <= set(mine.column_names)
    assert all(mine.schema.field(name).type == other.schema.field(name).type for name in names)
    exact = [name for name in names if name != "error_message"]
    rows = [sorted(table.select(exact).to_pylist(), key=lambda row: str(row["key"])) for table in (mine, other)]
    assert rows[0] == rows[1]


def test_its_engine_keeps_our_rule_about_addresses(table: UrlTable, tmp_path: Path, ray_cluster: Any) -> None:
    closed = ShardOptions(media=OPTIONS.media, number_sample_per_shard=5)
    with pytest.raises(SnapshotError, match="no row became a sample.*most often: .*not a public address"):
        refresh_with_img2dataset(table, Folder(tmp_path / "out"), closed, Workers())


def test_expected_hashes_mean_the_same(table: UrlTable, tmp_path: Path, ray_cluster: Any) -> None:
    frame = pandas.read_parquet(table.url_list)
    right = [hashlib.sha256(image(number)).hexdigest() for number in range(8)]
    frame["digest"] = [right[0], right[2], right[2], None, right[4].upper()[:10], *right[5:8], right[0], right[1]]
    frame.to_parquet(table.url_list)
    checked = replace(table, verify_hash="digest:sha256")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    refresh(checked, Folder(ours), OPTIONS, Workers(processes_count=0))
    refresh_with_img2dataset(checked, Folder(theirs), OPTIONS, Workers())
    outcomes = []
    for place in (ours, theirs):
        rows = [row for shard in ("00000", "00001") for row in pq.read_table(place / f"{shard}.parquet").to_pylist()]
        outcomes.append({row["key"]: (row["status"], row["error_message"] == "hash mismatch") for row in rows})
    assert outcomes[0] == outcomes[1] and sum(mismatch for _, mismatch in outcomes[0].values()) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("robots_txt", True), ("host_pause", 1.0), ("allow_stores", ("memory",)), ("allow_local_root", "/tmp")],
)
def test_what_it_lacks_is_refused(table: UrlTable, tmp_path: Path, field: str, value: Any) -> None:
    asked = replace(OPTIONS, downloads=replace(OPTIONS.downloads, **{field: value}))
    with pytest.raises(SettingError, match=field):
        refresh_with_img2dataset(table, Folder(tmp_path / "out"), asked, Workers())
    with pytest.raises(SettingError, match="verify_hash"):
        refresh_with_img2dataset(replace(table, verify_hash="url:md5"), Folder(tmp_path / "out"), OPTIONS, Workers())


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.1:1/", "http://2130706433/"]
)
def test_the_opener_refuses_what_the_downloader_refuses(url: str) -> None:
    with pytest.raises(Exception, match="(?i)refuse|unknown url|not allowed|None|private|loopback") as caught:
        opened = guarded_opener(DownloadOptions()).open(url, timeout=2)
        assert opened is not None, "None: no handler for this scheme"
    assert "Connection refused" not in str(caught.value)
