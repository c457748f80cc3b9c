"""From rows to a snapshot: the same bytes after any interruption, every row counted, no partial files."""

import errno
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError, SnapshotError, StorageError
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarWriter, iterate_tar
from pipeline.sources.folder import ImageFolder
from pipeline.sources.source import Part, Row, Slice
from pipeline.sources.urls import UrlTable
from pipeline.sources.webdataset import WebDatasetTars
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
LOOPBACK = DownloadOptions(allow_hosts=("127.0.0.1",), timeout=5.0)


def image(number: int, size: tuple[int, int] = (80, 60), form: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(file, form)
    return file.getvalue()


def options(rows: int = 4, **images: Any) -> ShardOptions:
    shaped = ImageOptions(**{"image_size": 32, **images})
    return ShardOptions(media=MediaOptions(image=shaped), downloads=LOOPBACK, number_sample_per_shard=rows)


def contents(folder: Path) -> dict[str, Any]:
    """Digest of every file but the manifest; the stats without their times."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name.endswith("_stats.json"):
            plain = json.loads(path.read_text())
            found[name] = {
                key: value for key, value in plain.items() if key not in ("duration", "start_time", "end_time")
            }
        elif not name.startswith("_snapshots/") and not name.startswith("_plan/"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = None
    return found


def samples(snapshot: Snapshot) -> dict[str, dict[str, bytes]]:
    folder = Folder(snapshot.folder)
    found: dict[str, dict[str, bytes]] = {}
    for shard in snapshot.shards:
        with folder.open(shard.tar) as file:
            found |= {sample.key: sample.fields for sample in iterate_tar(file)}
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("0*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.jpg").write_bytes(image(number))
        (folder / f"{number}.txt").write_text(f"image number {number}")
    return ImageFolder(folder=str(folder))


def test_a_folder_becomes_shards_in_order(images: ImageFolder, tmp_path: Path) -> None:
    snapshot = refresh(images, Folder(tmp_path / "out"), options(), HERE)
    assert (snapshot.samples, snapshot.rows, [shard.samples for shard in snapshot.shards]) == (10, 10, [4, 4, 2])
    found = samples(snapshot)
    assert list(found) == [f"{shard:05d}{index}" for shard in range(3) for index in range(4)][:10]
    for number, fields in enumerate(found.values()):
        assert fields["txt"].decode() == f"image number {number}"
        assert Image.open(io.BytesIO(fields["jpg"])).size == (32, 32)
        plain = json.loads(fields["json"])
        assert plain["sha256"] == hashlib.sha256(image(number)).hexdigest()
        assert (plain["original_width"], plain["original_height"], plain["status"]) == (80, 60, "success")


def test_ray_and_this_process_make_the_same_bytes(images: ImageFolder, tmp_path: Path, ray_cluster: Any) -> None:
    refresh(images, Folder(tmp_path / "here"), options(), HERE)
    refresh(images, Folder(tmp_path / "there"), options(), Workers())
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_running_again_writes_nothing(images: ImageFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = refresh(images, Folder(out), options(), HERE)
    times = {path: path.stat().st_mtime_ns for path in out.glob("0*")}
    assert refresh(images, Folder(out), options(), HERE) == first
    assert {path: path.stat().st_mtime_ns for path in out.glob("0*")} == times and len(snapshot_ids(Folder(out))) == 1


@pytest.mark.parametrize("missing", ["00001_stats.json", "00001.tar", "00001.parquet"])
def test_a_shard_without_its_mark_is_made_again(missing: str, images: ImageFolder, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    refresh(images, Folder(whole), options(), HERE)
    refresh(images, Folder(broken), options(), HERE)
    # A kill leaves some of the files, never the mark.
    (broken / "00001_stats.json").unlink()
    (broken / missing).unlink(missing_ok=True)
    (broken / ".tmp-half").write_bytes(b"half a tar")
    refresh(images, Folder(broken), options(), HERE)
    assert contents(whole) == contents(broken)


@pytest.mark.parametrize("lost", [["00001.tar"], ["00001.parquet"], ["00000.tar", "00000.parquet", "00002.tar"]])
def test_files_that_a_finished_shard_has_lost_are_made_again(
    lost: list[str], images: ImageFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    snapshot = refresh(images, Folder(out), options(), HERE)
    before = contents(out)
    for name in lost:
        (out / name).unlink()
    caplog.set_level("WARNING")
    assert refresh(images, Folder(out), options(), HERE) == snapshot
    assert contents(out) == before and len(snapshot_ids(Folder(out))) == 1
    shards = len({name.partition(".")[0] for name in lost})
    assert f"{shards} finished shards have lost files ({lost[0]}" in caplog.text


def test_other_work_in_the_folder_is_refused(images: ImageFolder, tmp_path: Path) -> None:
    out = Folder(tmp_path / "out")
    refresh(images, out, options(), HERE)
    for other in (options(image_size=48), options(rows=5), options(encode_quality=80)):
        with pytest.raises(SettingError, match="output_folder"):
            refresh(images, out, other, HERE)
    (Path(images.folder) / "new.jpg").write_bytes(image(11))
    with pytest.raises(SettingError, match="output_folder"):
        refresh(images, out, options(), HERE)


class Killed(BaseException):
    """Stands for the power going off: no handler of the code under test may catch it."""


@pytest.mark.parametrize("steps", range(1, 12))
def test_stopped_after_any_write_the_same_command_ends_in_the_same_bytes(
    steps: int, images: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh(images, Folder(tmp_path / "whole"), options(), HERE)
    left = steps
    real = Folder.write_atomic

    def counted(self: Folder, name: str, content: bytes | Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(self, name, content)

    monkeypatch.setattr(Folder, "write_atomic", counted)
    with pytest.raises(Killed):
        refresh(images, Folder(tmp_path / "cut"), options(), HERE)
    with pytest.raises(SnapshotError):
        read_snapshot(str(tmp_path / "cut"))
    monkeypatch.setattr(Folder, "write_atomic", real)
    refresh(images, Folder(tmp_path / "cut"), options(), HERE)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@dataclass(frozen=True, kw_only=True)
class Fatal:
    """Ten images; the process that reads the second slice first dies at its third row."""

    kind: ClassVar[str] = "fatal"
    has_captions: ClassVar[bool] = True
    mark: str

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        for start in range(0, 10, rows_per_shard):
            yield Slice(count=min(rows_per_shard, 10 - start), digest=str(start), where={"start": start})

    def rows(self, piece: Slice) -> Iterator[Row]:
        start = int(piece.where["start"])
        for number in range(start, start + piece.count):
            if number == 6 and not os.path.exists(self.mark):
                open(self.mark, "w").close()
                os._exit(9)
            yield Row(url=str(number), caption="c", parts=(Part("image", image(number)),))

    def schema(self) -> Mapping[str, type]:
        return {}


def test_a_worker_that_dies_is_replaced(tmp_path: Path, ray_cluster: Any) -> None:
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
    mark = tmp_path / "died"
    refresh(Fatal(mark=str(mark)), Folder(tmp_path / "there"), options(), Workers())
    assert mark.exists()
    refresh(Fatal(mark=str(mark)), Folder(tmp_path / "here"), options(), HERE)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_s3_holds_the_same_snapshot_as_the_disk(images: ImageFolder, tmp_path: Path, s3: str, ray_cluster: Any) -> None:
    there = refresh(images, Folder(f"{s3}/data"), options(), Workers())
    here = refresh(images, Folder(tmp_path / "here"), options(), HERE)
    assert there.digest == here.digest and read_snapshot(f"{s3}/data") == there
    assert samples(there) == samples(here)
    names = Folder(f"{s3}/data").names()
    assert names == sorted(path.name for path in (tmp_path / "here").iterdir() if path.is_file())


def test_a_full_disk_is_one_sentence_and_no_half_shard(
    images: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = TarWriter.write, 0

    def full(self: TarWriter, sample: Sample) -> None:
        nonlocal written
        written += 1
        if written > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, sample)

    monkeypatch.setattr(TarWriter, "write", full)
    with pytest.raises(StorageError, match="disk is full"):
        refresh(images, Folder(tmp_path / "out"), options(), HERE)
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert files == {"00000.tar", "00000.parquet", "00000_stats.json"}
    monkeypatch.undo()
    refresh(images, Folder(tmp_path / "out"), options(), HERE)
    refresh(images, Folder(tmp_path / "whole"), options(), HERE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_store_that_refuses_is_one_sentence(images: ImageFolder, s3_endpoint: str, ray_cluster: Any) -> None:
    for workers in (HERE, Workers()):
        with pytest.raises(StorageError, match="no-such-bucket"):
            refresh(images, Folder("s3://no-such-bucket/data"), options(), workers)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than any machine has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.open(io.BytesIO(image(1))).save(file, "JPEG", exif=exif)
    return file.getvalue()


def animated() -> bytes:
    frames = [Image.open(io.BytesIO(image(number))) for number in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def deep() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13).save(file, "PNG")
    return file.getvalue()


GOOD: Mapping[str, Callable[[], bytes]] = {
    "plain": lambda: image(0),
    "png": lambda: image(1, form="PNG"),
    "webp": lambda: image(2, form="WEBP"),
    "bmp": lambda: image(3, form="BMP"),
    "tiff": lambda: image(4, form="TIFF"),
    "grey": lambda: image(5, mode="L"),
    "cmyk": lambda: image(6, mode="CMYK"),
    "palette": lambda: image(7, form="PNG", mode="P"),
    "alpha": lambda: image(8, form="PNG", mode="RGBA"),
    "sixteen-bit": deep,
    "turned": turned,
    "animated": animated,
}
BAD: Mapping[str, bytes] = {
    "empty": b"",
    "html": b"<!doctype html><title>not found</title>",
    "fake": b"\xff\xd8\xff\xe0 not a jpeg at all",
    "cut": image(9, (640, 480))[:3000],
    "bomb": bomb(100_000, 100_000),
}


def test_every_kind_of_image_is_kept_or_counted_with_its_reason(tmp_path: Path, serve: Any) -> None:
    bodies = {name: make() for name, make in GOOD.items()} | dict(BAD)
    server = serve(bodies)
    urls = [f"{server.url}/{name}" for name in bodies] + [
        f"{server.url}/dead",
        "http://127.0.0.1:1/refused",
        "",
        "nonsense",
    ]
    pandas.DataFrame({"url": urls, "caption": "x"}).to_parquet(tmp_path / "list.parquet")
    source = UrlTable(url_list=str(tmp_path / "list.parquet"), caption_col="caption")
    snapshot = refresh(source, Folder(tmp_path / "out"), options(rows=1000), HERE)
    rows = {row["url"].removeprefix(server.url + "/"): row for row in rows_of(tmp_path / "out")}
    assert {name for name, row in rows.items() if row["status"] == "success"} == set(GOOD)
    assert snapshot.samples == len(GOOD) and snapshot.rows == len(urls)
    failed = {name: (row["status"], row["error_class"]) for name, row in rows.items() if row["status"] != "success"}
    assert {status for status, _ in failed.values()} == {"failed_to_download", "failed_to_resize"}
    assert failed["dead"] == ("failed_to_download", "http_4xx") and rows["dead"]["http_status"] == 404
    assert failed["http://127.0.0.1:1/refused"] == ("failed_to_download", "connect")
    assert failed["bomb"][0] == "failed_to_resize" and failed["cut"][0] == "failed_to_resize"
    assert sum(snapshot.dropped.values()) == len(failed) and all(reason for _, reason in failed.values())


CAPTIONS = [
    "plain",
    "two\nlines\r\nand\ta tab",
    "café 🐈‍⬛ 中文 ‮right to left",
    "\x00\x01\x1b[31m",
    "",
    "x" * 100_000,
    " ",
]


def test_captions_of_every_kind_come_through(tmp_path: Path, serve: Any) -> None:
    server = serve({f"{number}.jpg": image(number) for number in range(len(CAPTIONS))})
    urls = [f"{server.url}/{number}.jpg" for number in range(len(CAPTIONS))]
    pandas.DataFrame({"url": urls, "caption": CAPTIONS}).to_parquet(tmp_path / "list.parquet")
    source = UrlTable(url_list=str(tmp_path / "list.parquet"), caption_col="caption")
    snapshot = refresh(source, Folder(tmp_path / "out"), options(rows=100), HERE)
    texts = [fields["txt"].decode() for fields in samples(snapshot).values()]
    assert texts == [caption.replace("\0", "") for caption in CAPTIONS]
    assert [row["caption"] for row in rows_of(tmp_path / "out")] == texts


def test_loopback_is_refused_unless_named(tmp_path: Path, serve: Any) -> None:
    server = serve({"a.jpg": image(0)})
    pandas.DataFrame({"url": [f"{server.url}/a.jpg"]}).to_parquet(tmp_path / "list.parquet")
    source = UrlTable(url_list=str(tmp_path / "list.parquet"))
    closed = ShardOptions(media=MediaOptions(image=ImageOptions(image_size=32)))
    with pytest.raises(SnapshotError, match="policy"):
        refresh(source, Folder(tmp_path / "out"), closed, HERE)
    assert server.requests == []


def test_own_shards_are_a_source_and_keep_their_images(images: ImageFolder, tmp_path: Path) -> None:
    refresh(images, Folder(tmp_path / "first"), options(), HERE)
    source = WebDatasetTars(tars=str(tmp_path / "first"))
    again = refresh(source, Folder(tmp_path / "second"), options(resize_mode="no", skip_reencode=True), HERE)
    first = samples(read_snapshot(str(tmp_path / "first")))
    assert {key: (fields["jpg"], fields["txt"]) for key, fields in samples(again).items()} == {
        key: (fields["jpg"], fields["txt"]) for key, fields in first.items()
    }


def test_boxes_are_not_kept_beside_a_resized_image(tmp_path: Path) -> None:
    with open(tmp_path / "in.tar", "wb") as file:
        writer = TarWriter(file)
        writer.write(Sample("a", {"jpg": image(0), "boxes.json": b"[]"}))
        writer.write(Sample("b", {"jpg": image(1)}))
        writer.close()
    source = WebDatasetTars(tars=str(tmp_path / "in.tar"))
    resized = refresh(source, Folder(tmp_path / "resized"), options(), HERE)
    assert resized.samples == 1 and resized.dropped == {"stale_annotation": 1}
    kept = refresh(source, Folder(tmp_path / "kept"), options(resize_mode="no"), HERE)
    assert samples(kept)["000000"]["boxes.json"] == b"[]"


def test_failed_images_keep_their_size_and_successes_their_attempts(tmp_path: Path, serve: Any) -> None:
    """The sizes are those of the images that Pillow has written; one request each."""
    server = serve({"good.jpg": image(1, (80, 60)), "small.jpg": image(2, (30, 90)), "none.jpg": b"<html>"})
    urls = [f"{server.url}/{name}.jpg" for name in ("good", "small", "none")]
    pandas.DataFrame({"url": urls}).to_parquet(tmp_path / "list.parquet")
    source = UrlTable(url_list=str(tmp_path / "list.parquet"))
    refresh(source, Folder(tmp_path / "out"), options(min_image_size=40), HERE)
    found = {row["url"].rpartition("/")[2]: row for row in rows_of(tmp_path / "out")}
    sizes = {name: (row["original_width"], row["original_height"]) for name, row in found.items()}
    assert sizes == {"good.jpg": (80, 60), "small.jpg": (30, 90), "none.jpg": (None, None)}
    assert [found[name]["attempts"] for name in ("good.jpg", "small.jpg")] == [1, 1]
