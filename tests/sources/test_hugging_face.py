"""Parquet files with images, written by pyarrow and by Hugging Face's own package."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.hugging_face import HuggingFaceParquet
from pipeline.sources.source import Part, Row
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 50, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, numbers: range, group: int = 3, **columns: Any) -> None:
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    table = pa.table(
        {
            "image": pa.array(images, IMAGE),
            "text": [f"image {number}" for number in numbers],
            "score": [number / 2 for number in numbers],
            **columns,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def read(source: HuggingFaceParquet, scratch: Path, rows: int) -> list[list[Row]]:
    return [list(source.rows(piece)) for piece in source.slices(rows, Folder(scratch))]


@pytest.mark.parametrize("rows_per_shard", [1, 2, 3, 4, 7, 100])
def test_slices_of_any_size_give_every_row_once_in_order(tmp_path: Path, rows_per_shard: int) -> None:
    write(tmp_path / "data" / "train-0.parquet", range(8))
    write(tmp_path / "data" / "train-1.parquet", range(8, 13), group=2)
    write(tmp_path / "data" / "test-0.parquet", range(50, 52))
    source = HuggingFaceParquet(parquet=f"{tmp_path}/data/train-*.parquet", save_additional_columns=("score",))
    shards = read(source, tmp_path, rows_per_shard)
    assert all(len(rows) <= rows_per_shard for rows in shards)
    flat = [row for rows in shards for row in rows]
    assert [row.caption for row in flat] == [f"image {number}" for number in range(13)]
    assert [row.body("image") for row in flat] == [png(number) for number in range(13)]
    assert [row.url for row in flat] == [f"{number}.png" for number in range(13)]
    assert flat[3].columns == {"score": 1.5} and source.schema() == {"score": float}
    assert [piece.count for piece in source.slices(rows_per_shard, Folder(tmp_path))] == list(map(len, shards))


def test_a_changed_file_changes_only_its_own_digests(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.parquet", range(4))
    source = HuggingFaceParquet(parquet=str(tmp_path))
    before = [piece.digest for piece in source.slices(2, Folder(tmp_path))]
    assert len(set(before)) == 4 and before == [piece.digest for piece in source.slices(2, Folder(tmp_path))]
    write(tmp_path / "1.parquet", range(1, 5))
    after = [piece.digest for piece in source.slices(2, Folder(tmp_path))]
    assert before[:2] == after[:2] and not set(before[2:]) & set(after[2:])


def test_rows_without_bytes_are_downloaded_or_a_problem(tmp_path: Path) -> None:
    images = [{"bytes": None, "path": "https://x/a.jpg"}, {"bytes": None, "path": "gone.png"}, None]
    table = pa.table({"image": pa.array(images, IMAGE), "captions": [["first", "second"], [], None]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = HuggingFaceParquet(parquet=str(tmp_path / "a.parquet"), caption_col="captions")
    rows = read(source, tmp_path, 10)[0]
    assert [row.caption for row in rows] == ["first", "", ""]
    assert rows[0].url == "https://x/a.jpg" and rows[0].problem is None and rows[0].body("image") is None
    assert all(row.problem is not None and row.problem.error_class == "no_picture" for row in rows[1:])


def test_plain_bytes_are_images_too(tmp_path: Path) -> None:
    table = pa.table({"jpg": pa.array([png(1)], pa.large_binary()), "link": ["http://x/1"]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = HuggingFaceParquet(parquet=str(tmp_path), image_col="jpg", caption_col=None, url_col="link")
    assert read(source, tmp_path, 5) == [[Row(url="http://x/1", parts=(Part("image", png(1), url="http://x/1"),))]]


@pytest.mark.filterwarnings("ignore")
def test_files_of_the_package_datasets_are_read_with_their_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((8, 8, 3), number, np.uint8)) for number in range(3)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    columns = {"image": images, "text": ["a", "b", "c"], "label": [0, 1, -1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "a.parquet"))
    source = HuggingFaceParquet(parquet=str(tmp_path / "a.parquet"), save_additional_columns=("label",))
    rows = read(source, tmp_path, 2)
    assert source.schema() == {"label": str}
    assert [row.columns["label"] for part in rows for row in part] == ["cat", "dog", None]
    assert np.array(Image.open(io.BytesIO(rows[1][0].body("image") or b""))).max() == 2


def test_it_becomes_shards(tmp_path: Path, s3: str) -> None:
    write(tmp_path / "in" / "a.parquet", range(5))
    folder = Folder(s3).folder("in")
    folder.write_atomic("a.parquet", (tmp_path / "in" / "a.parquet").read_bytes())
    options = ShardOptions(media=MediaOptions(image=ImageOptions(image_size=32)), number_sample_per_shard=2)
    for place in (str(tmp_path / "in"), folder.uri):
        source = open_source({"kind": "hugging-face", "parquet": place})
        snapshot = refresh(source, Folder(f"{tmp_path}/{place[:2]}out"), options, Workers(processes_count=0))
        assert snapshot.samples == 5 and len(snapshot.shards) == 3


def test_wrong_settings_are_said_in_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", range(2))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    good = str(tmp_path / "a.parquet")
    for options, said in [
        ({"parquet": str(tmp_path / "no.parquet")}, "no such file or folder"),
        ({"parquet": str(tmp_path / "broken.parquet")}, "whole parquet file"),
        ({"parquet": good, "image_col": "img"}, "image, text, score"),
        ({"parquet": good, "image_col": "text", "caption_col": None}, "the file has: image"),
        ({"parquet": good, "caption_col": "caption"}, "image, text, score"),
        ({"parquet": good, "save_additional_columns": ("width",)}, "names that the shards do not use"),
    ]:
        with pytest.raises(SettingError, match=said):
            list(HuggingFaceParquet(**options).slices(2, Folder(tmp_path)))  # type: ignore[arg-type]
