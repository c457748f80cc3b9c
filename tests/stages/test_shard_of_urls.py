"""One shard of a url table: its parquet rows for each download, and the fields of its samples."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.sources.folder import ImageFolder
from pipeline.sources.source import Source
from pipeline.sources.urls import UrlTable
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.refresh.make_shard import ShardOptions, make_shard
from pipeline.stages.refresh.plan import Unit


def image(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def make(source: Source, folder: Path, **images: Any) -> tuple[list[dict[str, Any]], dict[str, dict[str, bytes]]]:
    """Rows of the parquet and samples of the only shard."""
    downloads = DownloadOptions(allow_hosts=("127.0.0.1",), timeout=5.0, retries=1, retry_delay=0.01)
    options = ShardOptions(media=MediaOptions(image=ImageOptions(**{"image_size": 32, **images})), downloads=downloads)
    out = Folder(folder / "out")
    (piece,) = source.slices(1000, Folder(folder / "plan"))
    make_shard(Unit(shard_id=0, piece=piece, digest="unit"), source, out, options)
    with out.open("00000.tar") as file:
        samples = {sample.key: sample.fields for sample in iterate_tar(file)}
    return pq.read_table(folder / "out" / "00000.parquet").to_pylist(), samples


def table(folder: Path, rows: list[dict[str, Any]], **options: Any) -> UrlTable:
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return UrlTable(url_list=str(path), **options)


def test_the_parquet_keeps_validators_and_the_samples_do_not(serve: Any, tmp_path: Path) -> None:
    headers = {"ETag": 'W/"7"', "Last-Modified": "Sun, 22 Nov 2026 08:00:00 GMT"}
    server = serve({"a.jpg": serve.Reply(image(0), headers=headers), "b.jpg": image(1)})
    rows, samples = make(table(tmp_path, [{"url": f"{server.url}/{name}.jpg"} for name in "ab"]), tmp_path)
    assert [(row["etag"], row["last_modified"]) for row in rows] == [('W/"7"', headers["Last-Modified"]), (None, None)]
    for fields in samples.values():
        assert not {"etag", "last_modified"} & set(json.loads(fields["json"]))


def test_other_sources_have_no_such_columns(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(image(0))
    rows, _ = make(ImageFolder(folder=str(tmp_path / "images")), tmp_path)
    assert not {"etag", "last_modified"} & set(rows[0])


def test_every_failed_row_tells_status_class_http_status_and_attempts(serve: Any, tmp_path: Path) -> None:
    busy = serve.Reply(b"", 503)
    files = {
        "gone.jpg": serve.Reply(b"", 404),
        "busy.jpg": busy,
        "page.jpg": b"<!doctype html><title>Not here</title>",
        "cut.jpg": image(0)[:900],
        "late.jpg": lambda before: image(1)[:900] if before else busy,
        "cut.gif": image(2, "GIF")[:900],
        "good.gif": image(3, "GIF"),
    }
    server = serve(files)
    rows, samples = make(table(tmp_path, [{"url": f"{server.url}/{name}"} for name in files]), tmp_path)
    outcomes = [(row["status"], row["error_class"], row["http_status"], row["attempts"]) for row in rows]
    assert outcomes == [
        ("failed_to_download", "http_4xx", 404, 1),
        ("failed_to_download", "http_5xx", 503, 2),
        ("failed_to_resize", "not_a_picture", 200, 1),
        ("failed_to_resize", "truncated", 200, 1),
        ("failed_to_resize", "truncated", 200, 2),
        ("failed_to_resize", "damaged", 200, 1),
        ("success", None, None, 1),
    ]
    assert len(samples) == 1


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_only_bodies_with_the_hash_in_the_table_pass(serve: Any, tmp_path: Path, algorithm: str) -> None:
    server = serve({f"{number}.jpg": image(number) for number in range(4)})
    hashes: list[str | None] = [hashlib.new(algorithm, image(number)).hexdigest() for number in range(4)]
    hashes[1], hashes[3] = hashes[0], None
    rows = [{"url": f"{server.url}/{number}.jpg", algorithm: value} for number, value in enumerate(hashes)]
    source = table(tmp_path, rows, verify_hash=f"{algorithm}:{algorithm}")
    made, samples = make(source, tmp_path)
    assert [row["status"] for row in made] == ["success", "failed_to_download"] * 2
    assert [row["error_message"] for row in made] == [None, "hash mismatch"] * 2
    assert [row["sha256"] for row in made[::2]] == [hashlib.sha256(image(number)).hexdigest() for number in (0, 2)]
    assert len(samples) == 2


@pytest.mark.parametrize("value", ["sha256", "column:crc32", ":md5", "column:"])
def test_a_senseless_hash_column_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(SettingError, match="verify_hash"):
        table(tmp_path, [{"url": "x"}], verify_hash=value)


def test_a_missing_hash_column_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="verify_hash"):
        list(table(tmp_path, [{"url": "x"}], verify_hash="digest:md5").slices(10, Folder(tmp_path / "plan")))


def test_pages_pass_where_nothing_is_looked_at(serve: Any, tmp_path: Path) -> None:
    server = serve({"a.txt": b"not an image, and wanted as it is"})
    rows, samples = make(
        table(tmp_path, [{"url": server.url + "/a.txt"}]), tmp_path, disable_all_reencoding=True, extract_exif=False
    )
    assert rows[0]["status"] == "success"
    (fields,) = samples.values()
    assert fields["jpg"] == b"not an image, and wanted as it is"
