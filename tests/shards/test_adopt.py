"""Adopting shards of other tools: their files do not change, and the real img2dataset continues afterwards."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from pipeline.errors import DataError, SettingError, SnapshotError, StorageError
from pipeline.loaders.samples import Samples
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.adopt import find_shards
from pipeline.shards.snapshot import Snapshot, publish_shards, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder, file_digest


def adopt(place: Path | str, skip_damaged: bool = False) -> Snapshot:
    adoption = find_shards(Folder(place))
    described = [adoption.read_tar(number) for number in range(len(adoption.names))]
    return adoption.publish(described, None, skip_damaged)


def foreign_tar(path: Path, keys: Sequence[str], text: str = "hello") -> None:
    """By Python's own tarfile in GNU's format, with folders and another order of members than ours."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key in keys:
            for field, content in (("txt", text.encode()), ("JPG", b"\xff\xd8"), ("cls", b"3")):
                member = tarfile.TarInfo(f"part/{key}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def state(folder: Path) -> dict[str, str]:
    """Digests of all files but those below _snapshots/."""
    files = (path for path in folder.rglob("*") if path.is_file() and "_snapshots" not in path.parts)
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def test_plain_tars_become_a_snapshot_where_they_lie(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "train-0.tar", ["a", "b"])
    foreign_tar(tmp_path / "train-1.tar", ["c"])
    (tmp_path / "notes.json").write_text("{}")
    before = state(tmp_path)
    snapshot = adopt(tmp_path)
    assert state(tmp_path) == before and sorted(os.listdir(tmp_path / "_snapshots"))[-1] == "adopted.parquet"
    assert [(shard.name, shard.samples) for shard in snapshot.shards] == [("train-0", 2), ("train-1", 1)]
    assert snapshot.fields == ("cls", "jpg", "txt") and snapshot.rows == 3
    for shard in snapshot.shards:
        assert (
            shard.sha256 == file_digest(tmp_path / shard.tar) and shard.bytes == (tmp_path / shard.tar).stat().st_size
        )
    samples = Samples(read_snapshot(str(tmp_path)))
    assert [samples[number].key for number in range(3)] == ["part/a", "part/b", "part/c"]


def test_again_reads_only_new_tars_and_keeps_sidecars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_tar(tmp_path / "0.tar", ["a"])
    first = adopt(tmp_path)
    marked = replace(first.shards[0], sidecars={"regions": "ab" * 32})
    publish_shards(Folder(tmp_path), (marked,), fields=first.fields, card=None, options={}, rows=1, dropped={})
    read: list[str] = []
    real = Folder.open
    monkeypatch.setattr(Folder, "open", lambda self, name: read.append(name) or real(self, name))
    assert adopt(tmp_path).shards == (marked,) and read == [] and len(snapshot_ids(Folder(tmp_path))) == 2
    foreign_tar(tmp_path / "1.tar", ["b"])
    grown = adopt(tmp_path)
    assert read == ["1.tar"] and grown.shards[0] == marked and grown.samples == 2
    foreign_tar(tmp_path / "0.tar", ["a"], text="other words")
    assert adopt(tmp_path).shards[0].sidecars == {}


def test_a_killed_adoption_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "012":
        foreign_tar(tmp_path / f"{name}.tar", [name])
    find_shards(Folder(tmp_path)).read_tar(1)
    read: list[str] = []
    real = Folder.open
    monkeypatch.setattr(Folder, "open", lambda self, name: read.append(name) or real(self, name))
    assert adopt(tmp_path).samples == 3 and read == ["0.tar", "2.tar"]
    assert not (tmp_path / "_snapshots" / "adopting").exists()


def test_damaged_tars_are_named_or_left_out(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "0.tar", ["a"])
    foreign_tar(tmp_path / "1.tar", ["b"])
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
    (tmp_path / "2.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(DataError, match="1.tar: not a whole tar.*compressed with gzip.*--skip-damaged"):
        adopt(tmp_path)
    assert [shard.name for shard in adopt(tmp_path, skip_damaged=True).shards] == ["0"]


def test_marks_of_img2dataset_tell_whole_tars_from_unfinished_ones(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "00000.tar", ["a", "b"])
    foreign_tar(tmp_path / "00001.tar", ["c"])
    plain = {"count": 5, "successes": 2, "failed_to_download": 2, "failed_to_resize": 1, "status_dict": {}}
    (tmp_path / "00000_stats.json").write_text(json.dumps(plain))
    assert find_shards(Folder(tmp_path)).unfinished == ("00001",)
    snapshot = adopt(tmp_path)
    assert (snapshot.samples, snapshot.rows) == (2, 5)
    assert snapshot.dropped == {"failed_to_download": 2, "failed_to_resize": 1}
    (tmp_path / "00001_stats.json").write_text(json.dumps({**plain, "successes": 9}))
    with pytest.raises(DataError, match="00001.tar holds 1 samples, 00001_stats.json says 9"):
        adopt(tmp_path)


def test_folders_that_cannot_be_adopted_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="folder with .tar files"):
        adopt(tmp_path)
    drawn_snapshot(Folder(tmp_path / "ours"), samples=4)
    with pytest.raises(SettingError, match="made elsewhere"):
        adopt(tmp_path / "ours")
    foreign_tar(tmp_path / "empty.tar", [])
    with pytest.raises(SnapshotError, match="no tar holds a sample"):
        adopt(tmp_path)


def test_a_read_only_folder_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_tar(tmp_path / "0.tar", ["a"])

    def refuse(self: Folder, name: str, content: object) -> None:
        raise StorageError("Permission denied")

    monkeypatch.setattr(Folder, "write_atomic", refuse)
    with pytest.raises(StorageError, match="get write access, or copy the samples with jobs/refresh_dataset.py"):
        adopt(tmp_path)


def test_on_s3_too(tmp_path: Path, s3: str) -> None:
    foreign_tar(tmp_path / "0.tar", ["a", "b"])
    folder = Folder(s3).folder("set")
    folder.write_atomic("0.tar", (tmp_path / "0.tar").read_bytes())
    snapshot = adopt(folder.uri)
    assert snapshot.samples == 2 and read_snapshot(folder.uri) == snapshot and folder.names() == ["0.tar"]
    assert adopt(folder.uri) == snapshot and not folder.fs.exists(f"{folder.path}/_snapshots/adopting")
    assert snapshot.digest == adopt(tmp_path).digest


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((90, 120, 3), number * 20, np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # img2dataset's own
def test_the_real_img2dataset_goes_on_in_an_adopted_folder(tmp_path: Path, serve: Any) -> None:
    pytest.importorskip("imghdr", reason="img2dataset does not import on Python 3.13")
    from img2dataset import download

    server = serve({f"{number}.jpg": jpeg(number) for number in range(6)})
    urls = [f"{server.url}/{number}.jpg" for number in range(6)]
    frame = pandas.DataFrame({"url": urls, "caption": [f"number {number}" for number in range(6)]})
    out = tmp_path / "out"

    def run(rows: int) -> None:
        frame.iloc[:rows].to_parquet(tmp_path / "list.parquet")
        download(
            url_list=str(tmp_path / "list.parquet"),
            input_format="parquet",
            caption_col="caption",
            output_folder=str(out),
            output_format="webdataset",
            image_size=64,
            number_sample_per_shard=3,
            processes_count=1,
            thread_count=4,
        )

    run(3)
    before = state(out)
    snapshot = adopt(out)
    assert state(out) == before and snapshot.samples == 3 and snapshot.fields == ("jpg", "json", "txt")
    run(6)
    requests = len(server.requests)
    assert requests == 6 and {name: state(out)[name] for name in before} == before
    grown = adopt(out)
    assert grown.samples == 6 and grown.parent == snapshot.id and grown.shards[0] == snapshot.shards[0]
    # The reason why no index may be beside the tars: its resume fails with one.
    (out / "sizes.json").write_text("{}")
    with pytest.raises(ValueError, match="sizes.json"):
        run(6)
