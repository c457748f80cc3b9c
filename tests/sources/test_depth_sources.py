"""Depth maps in published layouts: folders of pairs, a made-up file like NYUv2's, and what a refresh does."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline.codecs.image_annotations import fitted_depth
from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.dataset import load_card
from pipeline.errors import DataError, SampleError, SettingError, SnapshotError
from pipeline.loaders.depth import DepthReader
from pipeline.shards.depth_values import decode_depth
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.sources import depth_maps, open_source
from pipeline.sources.depth_maps import DepthMaps, scene_of
from pipeline.sources.nyu_depth import NyuDepth
from pipeline.sources.source import UNCHANGED, Row, Source
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

NO_RAY = Workers(processes_count=0)


def write(place: Path, content: bytes | str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content.encode() if isinstance(content, str) else content)


def encoded(values: Any, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values)).save(buffer, format=kind)
    return buffer.getvalue()


def photo(height: int = 2, width: int = 3) -> bytes:
    return encoded(np.full((height, width, 3), 90, np.uint8), "JPEG")


def pieces(source: Source, scratch: Path, at_once: int = 2) -> list[Row]:
    return [row for piece in list(source.slices(at_once, Folder(scratch))) for row in source.rows(piece)]


def depth_of(row: Row) -> np.ndarray:
    assert row.problem is None, row.problem
    return decode_depth(row.members["depth.png"])


# Pairs

MILLIMETRES = np.array([[1000, 0, 2500], [700, 65_535, 1]], np.uint16)


def test_the_folder_layout_of_nyu(tmp_path: Path) -> None:
    """By name: rgb_00045.jpg with sync_depth_00045.png; the scene is that of the folder."""
    for place in ("bathroom", "kitchen_0028b"):
        write(tmp_path / f"test/{place}/rgb_00045.jpg", photo())
        write(tmp_path / f"test/{place}/sync_depth_00045.png", encoded(MILLIMETRES))
    write(tmp_path / "test/bathroom/.hidden/rgb_1.jpg", photo())
    write(tmp_path / "readme.txt", "no image")
    source = DepthMaps(
        folder=str(tmp_path), images="test", depths="test", image_name="rgb_{}", depth_name="sync_depth_{}.png"
    )
    rows = pieces(source, tmp_path / "scratch")
    assert [row.url for row in rows] == ["test/bathroom/rgb_00045.jpg", "test/kitchen_0028b/rgb_00045.jpg"]
    assert [row.columns["scene"] for row in rows] == ["bathroom", "kitchen"]
    assert rows[0].members["depth.png"] == encoded(MILLIMETRES)  # the file itself
    assert depth_of(rows[0]).tolist() == (MILLIMETRES / np.float32(1000)).tolist()


def test_a_list_of_pairs_keeps_its_order(tmp_path: Path) -> None:
    """As of published lists: slashes at the begin, and the focal length after the paths."""
    for name in "ab":
        write(tmp_path / f"data/{name}.png", photo())
        write(tmp_path / f"data/{name}_depth.png", encoded(MILLIMETRES))
    write(tmp_path / "list.txt", "/b.png /b_depth.png 518.8579\n\na.png a_depth.png 518.8579\nc.png c_depth.png 1\n")
    source = DepthMaps(folder=str(tmp_path), pairs="list.txt", images="data", depths="data/")
    rows = pieces(source, tmp_path / "scratch")
    assert [row.url for row in rows] == ["data/b.png", "data/a.png", "data/c.png"]
    assert rows[2].problem is not None and rows[2].problem.error_class == "unreadable"


def test_pairs_in_two_folders_with_another_unit(tmp_path: Path) -> None:
    """KITTI: 256 values a metre. A folder that has both kinds by one name is paired once."""
    write(tmp_path / "image/drive_0002/a.png", photo())
    write(tmp_path / "truth/drive_0002/a.png", encoded(np.array([[256, 0, 640], [0, 0, 16_000]], np.uint16)))
    source = DepthMaps(folder=str(tmp_path), images="image", depths="truth", values_per_metre=256)
    (row,) = pieces(source, tmp_path / "scratch")
    assert depth_of(row).tolist() == [[1, 0, 2.5], [0, 0, 62.5]]


def test_kittis_farthest_pixels_are_missing(tmp_path: Path) -> None:
    """They are beyond what millimetres of 16 bits hold; where most are, the unit is wrong."""
    write(tmp_path / "image/a.png", photo())
    write(tmp_path / "truth/a.png", encoded(np.array([[256, 0, 640], [0, 0, 22_016]], np.uint16)))
    source = DepthMaps(folder=str(tmp_path), images="image", depths="truth", values_per_metre=256)
    (row,) = pieces(source, tmp_path / "scratch")
    assert depth_of(row).tolist() == [[1, 0, 2.5], [0, 0, 0]]
    write(tmp_path / "truth/a.png", encoded(np.array([[60_000, 0, 640], [0, 0, 60_000]], np.uint16)))
    (row,) = pieces(source, tmp_path / "scratch")
    assert row.problem is not None and row.problem.error_class == "bad_depth"
    assert "2 of 3 distances" in row.problem.message and "234.375 m" in row.problem.message


def test_bad_depth_maps_are_rows_with_a_reason(tmp_path: Path) -> None:
    bad = {"a": encoded(np.zeros((2, 3), np.uint8)), "b": b"no image", "c": encoded(np.zeros((2, 3, 3), np.uint8))}
    for name, content in bad.items():
        write(tmp_path / f"i/{name}.jpg", photo())
        write(tmp_path / f"d/{name}.png", content)
    write(tmp_path / "i/d.jpg", photo())
    rows = pieces(DepthMaps(folder=str(tmp_path), images="i", depths="d"), tmp_path / "scratch")
    reasons = [row.problem.error_class if row.problem else "" for row in rows]
    assert reasons == ["bad_depth", "bad_depth", "bad_depth", "no_depth"]


@pytest.mark.parametrize("unit", [1000, 256])
def test_a_map_of_another_size_is_not_decoded(tmp_path: Path, unit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the headers; one of exchanged sides may belong to an image that is displayed turned."""
    write(tmp_path / "i/a.jpg", photo())
    write(tmp_path / "d/a.png", encoded(np.ones((2000, 2000), np.uint16)))
    source = DepthMaps(folder=str(tmp_path), images="i", depths="d", values_per_metre=unit)
    with monkeypatch.context() as patch:
        patch.setattr(depth_maps, "depth_values", lambda content: pytest.fail("decoded"))
        (row,) = pieces(source, tmp_path / "scratch")
    assert row.problem is not None and row.problem.error_class == "stale_annotation"
    assert "a.png has 2000 x 2000 pixels, the image has 3 x 2" in row.problem.message
    write(tmp_path / "d/a.png", encoded(np.ones((3, 2), np.uint16)))
    assert depth_of(pieces(source, tmp_path / "scratch")[0]).shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"image_name": "rgb"}, "image_name"),
        ({"depth_name": "{}.tiff"}, "depth_name"),
        ({"values_per_metre": 0}, "values_per_metre"),
        ({"folder": "missing"}, "folder"),
        ({"pairs": "missing.txt"}, "pairs"),
        ({"pairs": "one.txt"}, "pairs"),
        ({"pairs": "outside.txt"}, "pairs"),
        ({"images": "empty"}, "depths"),
    ],
)
def test_bad_settings_name_the_field(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    write(tmp_path / "one.txt", "a.png\n")
    write(tmp_path / "outside.txt", "../a.png ../b.png\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=field):
        pieces(DepthMaps(**{"folder": str(tmp_path), **options}), tmp_path / "scratch")


def test_scenes_are_named_by_their_folder() -> None:
    named = {"a/kitchen_0028b/x.jpg": "kitchen", "home_office/x.jpg": "home_office", "x.jpg": "", "b_1/x.jpg": "b"}
    assert {path: scene_of(path) for path in named} == named


def test_a_changed_depth_map_changes_the_digest(tmp_path: Path) -> None:
    write(tmp_path / "i/a.jpg", photo())
    write(tmp_path / "d/a.png", encoded(MILLIMETRES))

    def digest(**more: Any) -> str:
        source = DepthMaps(folder=str(tmp_path), images="i", depths="d", **more)
        return next(iter(source.slices(2, Folder(tmp_path / "scratch")))).digest

    before = digest()
    assert digest() == before != digest(values_per_metre=256)
    write(tmp_path / "d/a.png", encoded(np.zeros((4, 4), np.uint16)))
    assert digest() != before


# NYU Depth v2


def labeled(place: Path, count: int = 5, height: int = 6, width: int = 8) -> dict[str, np.ndarray]:
    """A file in the layout of nyu_depth_v2_labeled.mat: reversed dimensions, names by reference."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (count, height, width, 3)).astype(np.uint8)
    depths = numbers.uniform(0.7, 9.9, (count, height, width)).astype(np.float32)
    raw = depths.copy()
    raw[:, :2] = 0
    raw[0, 5, 7] = np.nan
    with h5py.File(place, "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
        file["rawDepths"] = raw.transpose(0, 2, 1)
        names = [f"kitchen{number % 2 or ''}" for number in range(count)]
        references = np.empty((1, count), h5py.ref_dtype)
        for number, name in enumerate(names):
            codes = np.array([[ord(letter)] for letter in name], np.uint16)
            references[0, number] = file.create_dataset(f"#refs#/{number}", data=codes).ref
        file.create_dataset("sceneTypes", data=references, dtype=h5py.ref_dtype)
    return {"images": images, "depths": depths, "rawDepths": raw}


@pytest.fixture
def nyu(tmp_path: Path) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    arrays = labeled(tmp_path / "nyu.mat")
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[2], [4]]), "testNdxs": np.array([[5], [1], [3]])})
    yield str(tmp_path / "nyu.mat"), str(tmp_path / "splits.mat"), arrays


def test_the_file_of_nyu(nyu: tuple[str, str, dict[str, np.ndarray]], tmp_path: Path) -> None:
    """Images as they were, depth to half a millimetre, the official split in its order, scenes by reference."""
    file, splits, arrays = nyu
    rows = pieces(NyuDepth(file=file, splits=splits), tmp_path / "scratch")
    assert [row.url for row in rows] == [f"{file}#5", f"{file}#1", f"{file}#3"]
    assert [row.columns["scene"] for row in rows] == ["kitchen", "kitchen", "kitchen"]
    for row, number in zip(rows, (4, 0, 2), strict=True):
        image = np.asarray(Image.open(io.BytesIO(row.parts[0].body or b"")))
        assert np.array_equal(image, arrays["images"][number])
        assert np.abs(depth_of(row) - arrays["depths"][number]).max() < 0.00051
    train = pieces(NyuDepth(file=file, splits=splits, split="train"), tmp_path / "scratch")
    assert [row.url.rpartition("#")[2] for row in train] == ["2", "4"]
    assert [row.columns["scene"] for row in train] == ["kitchen1", "kitchen1"]
    raw = pieces(NyuDepth(file=file, split="all", depths="rawDepths"), tmp_path / "scratch")
    assert len(raw) == 5 and (depth_of(raw[0])[:2] == 0).all() and depth_of(raw[0])[5, 7] == 0


def test_files_that_are_not_nyus(nyu: tuple[str, str, dict[str, np.ndarray]], tmp_path: Path) -> None:
    file, splits, _ = nyu

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(SettingError, match=match):
            pieces(NyuDepth(**{"file": file, "splits": splits, **options}), tmp_path / "scratch")

    write(tmp_path / "text.mat", "no arrays")
    refused("HDF5", file=str(tmp_path / "text.mat"))
    refused("no such file", file=str(tmp_path / "missing.mat"))
    refused("MATLAB 5", splits=str(tmp_path / "text.mat"))
    refused("no such file", splits=str(tmp_path / "missing.mat"))
    refused("splits", splits="")
    with h5py.File(tmp_path / "other.mat", "w") as other:
        other["images"] = np.zeros((2, 3, 8, 6), np.uint8)
        other["depths"] = np.zeros((2, 6, 8), np.float32)
    refused("images \\[N, 3, W, H\\]", file=str(tmp_path / "other.mat"))
    savemat(tmp_path / "more.mat", {"trainNdxs": np.array([[1]]), "testNdxs": np.array([[6]])})
    refused("numbers from 1 to 5", splits=str(tmp_path / "more.mat"))
    savemat(tmp_path / "less.mat", {"trainNdxs": np.array([[1]])})
    refused("testNdxs", splits=str(tmp_path / "less.mat"))


def test_links_to_other_files_are_not_followed(tmp_path: Path) -> None:
    labeled(tmp_path / "secret.mat")
    labeled(tmp_path / "nyu.mat")
    with h5py.File(tmp_path / "nyu.mat", "r+") as file:
        del file["depths"]
        file["depths"] = h5py.ExternalLink(str(tmp_path / "secret.mat"), "depths")
    with pytest.raises(SettingError, match="file: "):
        pieces(NyuDepth(file=str(tmp_path / "nyu.mat"), split="all"), tmp_path / "scratch")


def hollow(file: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """An array that has a shape and no content."""
    if name in file:
        del file[name]
    file.create_dataset(name, shape=shape, dtype=kind, chunks=tuple(min(side, 64) for side in shape))


def test_headers_that_claim_more_than_the_file_has(tmp_path: Path) -> None:
    """10^9 images, images of 10^9 pixels, and depth that is text."""
    for images, depths, kind in (
        ((10**9, 3, 8, 6), (10**9, 8, 6), "f4"),
        ((2, 3, 32_000, 32_000), (2, 32_000, 32_000), "f4"),
        ((2, 3, 8, 6), (2, 8, 6), "S4"),
    ):
        with h5py.File(tmp_path / "nyu.mat", "w") as file:
            hollow(file, "images", images, "u1")
            hollow(file, "depths", depths, kind)
        with pytest.raises(DataError, match="nyu.mat: the array images has the shape .* but only 0 bytes"):
            pieces(NyuDepth(file=str(tmp_path / "nyu.mat"), split="all"), tmp_path / "scratch")
    labeled(tmp_path / "nyu.mat", count=2)
    with h5py.File(tmp_path / "nyu.mat", "r+") as file:
        del file["depths"]
        file["depths"] = np.full((2, 8, 6), b"text")
    with pytest.raises(SettingError, match="file: .*depths that are numbers"):
        pieces(NyuDepth(file=str(tmp_path / "nyu.mat"), split="all"), tmp_path / "scratch")


@pytest.mark.parametrize("name", ["images", "depths"])
@pytest.mark.parametrize("value", [5.0, h5py.Empty("f4")], ids=["scalar", "without a shape"])
def test_arrays_that_are_none(name: str, value: Any, tmp_path: Path) -> None:
    labeled(tmp_path / "nyu.mat", count=2)
    with h5py.File(tmp_path / "nyu.mat", "r+") as file:
        del file[name]
        file[name] = value
    with pytest.raises(SettingError, match="file: .*images \\[N, 3, W, H\\]"):
        pieces(NyuDepth(file=str(tmp_path / "nyu.mat"), split="all"), tmp_path / "scratch")


@pytest.mark.parametrize("kind", ["numbers", "flat", "few", "nothing", "a group", "floats", "long", "hollow"])
def test_damaged_names_of_scenes(kind: str, tmp_path: Path) -> None:
    """The images are as they were; their scene is not known."""
    labeled(tmp_path / "nyu.mat", count=2)
    with h5py.File(tmp_path / "nyu.mat", "r+") as file:
        del file["sceneTypes"]
        references = np.empty((1, 2), h5py.ref_dtype)
        if kind == "hollow":
            hollow(file, "#refs#/x", (10**10,), "u2")
            references[:] = file["#refs#/x"].ref
        elif kind not in ("numbers", "nothing"):
            content: dict[str, Any] = {"floats": np.ones(3), "long": np.full(5_000, 65, np.uint16)}
            target = (
                file.create_group("g") if kind == "a group" else file.create_dataset("x", data=content.get(kind, 1))
            )
            references[:] = target.ref
        data = {"numbers": np.zeros((1, 2)), "flat": references[0], "few": references[:, :0]}.get(kind, references)
        made = h5py.ref_dtype if kind != "numbers" else None
        file.create_dataset("sceneTypes", data=data, dtype=made)
    source = NyuDepth(file=str(tmp_path / "nyu.mat"), split="all")
    rows = pieces(source, tmp_path / "scratch")
    assert [(row.problem, row.columns["scene"], len(row.parts)) for row in rows] == [(None, "", 1)] * 2


def test_distances_in_millimetres_are_a_problem_of_their_row(tmp_path: Path) -> None:
    labeled(tmp_path / "nyu.mat", count=2)
    with h5py.File(tmp_path / "nyu.mat", "r+") as file:
        file["depths"][1] = 2500.0
    good, bad = pieces(NyuDepth(file=str(tmp_path / "nyu.mat"), split="all"), tmp_path / "scratch")
    assert good.problem is None and bad.problem is not None and bad.problem.error_class == "bad_depth"


def test_the_cards_open() -> None:
    card = load_card("nyu_depth_v2")
    assert card.samples == 654 and isinstance(open_source(card.source), NyuDepth)
    assert load_card("drawn_depth").source["depth"] is True


# In shards


def refreshed(source: Source, folder: Path, **options: Any) -> dict[str, Any]:
    media = MediaOptions(image=ImageOptions(**{**UNCHANGED, **options}))
    snapshot = refresh(source, Folder(folder), ShardOptions(media=media, number_sample_per_shard=10), NO_RAY)
    with open(folder / "00000.tar", "rb") as file:
        return {"snapshot": snapshot, "samples": list(iterate_tar(file, "tar"))}


def pairs(tmp_path: Path, depth: np.ndarray, height: int = 40, width: int = 60) -> DepthMaps:
    write(tmp_path / "i/a.jpg", photo(height, width))
    write(tmp_path / "d/a.png", encoded(depth))
    return DepthMaps(folder=str(tmp_path), images="i", depths="d")


def test_a_refresh_keeps_depth_or_resizes_it_with_the_image(tmp_path: Path) -> None:
    """Each pixel keeps one of the distances; a border has none."""
    depth = np.where(np.arange(60) < 30, 1000, 3000).astype(np.uint16)[None].repeat(40, axis=0)
    source = pairs(tmp_path, depth)
    (kept,) = refreshed(source, tmp_path / "kept")["samples"]
    assert kept.fields["depth.png"] == encoded(depth)
    (fitted,) = refreshed(source, tmp_path / "border", resize_mode="border", image_size=30, keep_bytes=False)["samples"]
    found = decode_depth(fitted.fields["depth.png"])
    assert found.shape == (30, 30) and set(np.unique(found)) == {0, 1, 3}
    assert (found[:5] == 0).all() and (found[25:] == 0).all()
    assert (found[5:25, :15] == 1).all() and (found[5:25, 15:] == 3).all()
    (middle,) = refreshed(source, tmp_path / "m", resize_mode="center_crop", image_size=20, keep_bytes=False)["samples"]
    assert decode_depth(middle.fields["depth.png"]).shape == (20, 20)
    row = DepthReader(size=None).read(fitted)
    assert row["valid"].sum() == 600 and row["depth"][10, 20] == 3


def test_another_size_or_8_bits_fail_with_their_reason(tmp_path: Path) -> None:
    """And a file of 8 bits that a source hands on, such as a WebDataset's."""
    with pytest.raises(SnapshotError, match="stale_annotation 1.*a.png has 30 x 20 pixels, the image has 60 x 40"):
        refreshed(pairs(tmp_path, np.zeros((20, 30), np.uint16)), tmp_path / "out")
    with pytest.raises(SampleError, match="depth.png has 30 x 20 pixels, the image has 60 x 40"):
        fitted_depth(encoded(np.zeros((20, 30), np.uint16)), (60, 40), ImageOptions(resize_mode="no"))
    narrow = encoded(np.zeros((40, 60), np.uint8))
    with pytest.raises(SampleError, match="8 bits"):
        fitted_depth(narrow, (60, 40), ImageOptions(resize_mode="no"))


def test_drawn_rooms_in_shards(tmp_path: Path) -> None:
    source = open_source({"kind": "drawn", "samples": 3, "size": 64, "depth": True, "truth": "none"})
    found = refreshed(source, tmp_path / "rooms", resize_mode="keep_ratio", image_size=32, keep_bytes=False)
    assert "depth.png" in found["snapshot"].fields
    assert all(decode_depth(one.fields["depth.png"]).shape == (32, 32) for one in found["samples"])
