"""The codec of point clouds: what is stored, what fails and why, the process apart, a whole refresh."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.codecs import codec_of
from pipeline.codecs.points import PointsCodec, PointsOptions
from pipeline.errors import SampleError, SettingError
from pipeline.shards.clouds import write_npy
from pipeline.shards.media import MEDIA, medium_of
from pipeline.shards.selection import read_samples
from pipeline.shards.storage import Folder
from pipeline.sources.folder import ImageFolder
from pipeline.stages.crawl.decode_apart import Apart
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.shards.test_clouds import FACES, HOSTILE, POINTS, npy, ply

CODEC = PointsCodec()
CLOUD = np.random.default_rng(0).normal(0, 2, (300, 3)).astype(np.float32)


def stored(body: bytes) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(body), allow_pickle=False)
    assert array.dtype == np.float32
    return array


def test_a_cloud_is_stored_with_its_columns() -> None:
    made = CODEC.encode(npy(CLOUD.astype(np.float64)), PointsOptions())
    assert list(made.fields) == ["points.npy"]
    np.testing.assert_array_equal(stored(made.fields["points.npy"]), CLOUD)
    extent = np.linalg.norm(CLOUD - CLOUD.mean(axis=0), axis=1).max()
    assert dict(made.columns) == {
        "points_count": 300,
        "points_original_count": 300,
        "points_faces": 0,
        "points_extent": pytest.approx(extent, rel=1e-5),
    }
    for name, kind in CODEC.columns.items():
        assert isinstance(made.columns[name], kind)
    again = CODEC.encode(made.fields["points.npy"], PointsOptions())
    assert again.fields == made.fields
    np.testing.assert_array_equal(CODEC.decode(made.fields["points.npy"]), CLOUD)


def test_large_clouds_are_reduced_and_meshes_sampled() -> None:
    few = CODEC.encode(npy(CLOUD), PointsOptions(points_count=100))
    assert few.columns["points_count"] == 100 and few.columns["points_original_count"] == 300
    assert {tuple(row) for row in stored(few.fields["points.npy"])} <= {tuple(row) for row in CLOUD}
    mesh = CODEC.encode(ply("<", faces=FACES), PointsOptions(points_surface=50))
    assert (mesh.columns["points_count"], mesh.columns["points_faces"]) == (50, 2)
    assert mesh.fields == CODEC.encode(ply("<", faces=FACES), PointsOptions(points_surface=50)).fields


@pytest.mark.parametrize(
    ("options", "error_class"),
    [(PointsOptions(points_max=299), "too_many"), (PointsOptions(points_min=301), "too_few")],
)
def test_limits(options: PointsOptions, error_class: str) -> None:
    with pytest.raises(SampleError) as caught:
        CODEC.encode(npy(CLOUD), options)
    assert caught.value.error_class == error_class


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_fail_with_a_reason(name: str) -> None:
    body, error_class = HOSTILE[name]
    with pytest.raises(SampleError) as caught:
        CODEC.encode(body, PointsOptions())
    assert caught.value.error_class == error_class


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"points_min": 1}, "points_min"),
        ({"points_count": -1}, "points_count"),
        ({"points_surface": 0}, "points_surface"),
        ({"points_max": 10**9}, "points_max"),
    ],
)
def test_settings(options: dict[str, int], field: str) -> None:
    with pytest.raises(SettingError, match=f"^{field}: got"):
        PointsOptions(**options)


def test_texts_are_parsed_in_a_process_apart() -> None:
    assert not CODEC.needs_care(npy(CLOUD)) and CODEC.needs_care(ply("")) and CODEC.needs_care(b"OFF\n")
    with Apart("points", PointsOptions()) as apart:
        np.testing.assert_array_equal(stored(apart.encode(ply("")).fields["points.npy"]), POINTS)
        with pytest.raises(SampleError) as caught:
            apart.encode(HOSTILE["a truncated OFF"][0])
        assert caught.value.error_class == "truncated"


def test_the_medium_leaves_other_arrays_alone() -> None:
    assert codec_of("points").medium == "points" and list(MEDIA)[-1] == "points"
    assert medium_of("npy") is None and medium_of("mel.npy") is None
    assert all(medium_of(field) is MEDIA["points"] for field in ("points.npy", "ply", "off"))
    starts = MEDIA["points"].starts
    assert all(starts(body[:16]) for body in (npy(CLOUD), ply("<"), b"COFF\n4 4 0\n1 2 3"))
    assert not any(starts(body) for body in (b"\x89PNG\r\n\x1a\n" + bytes(8), b"TCTCTC off we go", b"plywood is wood "))


def test_a_folder_of_files_becomes_shards_with_reasons(tmp_path: Path) -> None:
    files = {
        "chair/a.ply": ply(">", faces=FACES),
        "chair/b.off": b"OFF\n4 0 0\n" + b"".join(b"%r %r %r\n" % tuple(row) for row in POINTS.tolist()),
        "table/c.points.npy": write_npy(CLOUD),
        "table/d.ply": ply("")[:-4],
        "table/e.ply": b"<html>",
        "table/f.points.npy": npy(np.full((5, 3), np.nan)),
        "table/g.points.npy": npy(np.ones((5, 3), np.float32)),
        "table/h.npy": npy(CLOUD),
        "table/c.txt": b"a table of points",
    }
    for name, body in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(body)
    source = ImageFolder(folder=str(tmp_path / "in"), media=("points",))
    made = refresh(source, Folder(tmp_path / "out"), ShardOptions(), Workers(processes_count=0))
    assert made.samples == 4 and Counter(made.dropped) == {
        "truncated": 1,
        "not_a_cloud": 1,
        "not_finite": 1,
        "no_extent": 1,
    }
    rows = pq.read_table(tmp_path / "out/00000.parquet").to_pylist()
    assert [row["points_count"] for row in rows][:3] == [2048, 4, 300] and rows[-1]["points_count"] == 300
    samples = list(read_samples(Folder(tmp_path / "out"), made.shards[0]))
    assert [json.loads(one.fields["json"])["label"] for one in samples] == ["chair", "chair", "table", "table"]
    assert samples[2].fields["txt"] == b"a table of points"
    assert all(stored(one.fields["points.npy"]).shape[1] == 3 for one in samples)
