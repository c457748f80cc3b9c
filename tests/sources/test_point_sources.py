"""Sources of point clouds: HDF5 as published, broken files, class folders, drawn solids."""

import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pipeline.dataset import load_card
from pipeline.errors import DataError, SettingError
from pipeline.evaluation.few_shot import read_data_set
from pipeline.shards.clouds import extent_of
from pipeline.shards.storage import Folder
from pipeline.sources import hdf5_points, open_source
from pipeline.sources.drawn.solids import MESHES, NOVEL_SOLIDS, SOLIDS, SYNONYMS
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.folder import ImageFolder
from pipeline.sources.hdf5_points import Hdf5Points
from pipeline.sources.source import Row, Source

RANDOM = np.random.default_rng(0)
CLOUDS = RANDOM.normal(0, 1, (7, 32, 3)).astype(np.float32)


def rows_of(source: Source, scratch: Path, at_once: int = 3) -> list[Row]:
    pieces = list(source.slices(at_once, Folder(scratch)))
    rows = [row for piece in pieces for row in source.rows(piece)]
    assert len(rows) == sum(piece.count for piece in pieces)
    return rows


def points_of(row: Row) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(row.body("points") or b""), allow_pickle=False)
    return array


def write_h5(path: Path, clouds: np.ndarray = CLOUDS, labels: Any = None, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(len(clouds)) % 3 if labels is None else np.asarray(labels)
    with h5py.File(path, "w") as file:
        file["data"], file["label"] = clouds, numbers
        for name, value in more.items():
            file[name] = value
    return path


@pytest.fixture
def modelnet(tmp_path: Path) -> Path:
    """The layout of modelnet40_ply_hdf5_2048: labels [M, 1] as uint8, lists with the authors' own paths."""
    folder = tmp_path / "modelnet"
    numbers = (np.arange(7) % 3).astype(np.uint8)[:, None]
    write_h5(folder / "ply_data_train0.h5", CLOUDS[:4], numbers[:4], normal=CLOUDS[:4])
    write_h5(folder / "ply_data_train1.h5", CLOUDS[4:], numbers[4:])
    write_h5(folder / "ply_data_test0.h5", 2 * CLOUDS, numbers)
    paths = "data/modelnet40_ply_hdf5_2048/ply_data_"
    (folder / "train_files.txt").write_text(f"{paths}train0.h5\n{paths}train1.h5\n")
    (folder / "test_files.txt").write_text(f"{paths}test0.h5\n")
    (folder / "shape_names.txt").write_text("airplane\nnight_stand\nxbox\n")
    return folder


def test_modelnet_as_published(modelnet: Path, tmp_path: Path) -> None:
    card = load_card("modelnet40")
    source = open_source({**card.source, "folder": str(modelnet), "files": ["train_files.txt"]})
    assert isinstance(source, Hdf5Points)
    rows = rows_of(source, tmp_path)
    assert [row.url for row in rows][3:5] == ["ply_data_train0.h5#3", "ply_data_train1.h5#0"]
    for row, cloud in zip(rows, CLOUDS, strict=True):
        np.testing.assert_array_equal(points_of(row), cloud)
    assert source.labels() == [row.columns["label"] for row in rows]
    assert rows[1].caption == "a night stand" and rows[1].columns == {"label": "night_stand", "class_number": 1}
    whole = rows_of(source, tmp_path, at_once=100)
    assert [row.body("points") for row in whole] == [row.body("points") for row in rows]


def test_the_parts_of_a_card_are_few_shot_data(modelnet: Path) -> None:
    (modelnet.parent / "modelnet40_ply_hdf5_2048").symlink_to(modelnet)
    data = read_data_set("modelnet40", root=str(modelnet.parent))
    assert data.medium == "points" and data.classes == ("airplane", "night_stand", "xbox")
    assert (len(data.labels["train"]), len(data.labels["test"])) == (7, 7)
    assert data.templates == ("point cloud of a big {}.",)


def test_scanobjectnn_as_published(tmp_path: Path) -> None:
    card = load_card("scanobjectnn")
    assert len(card.classes) == 15 and tuple(card.source["classes"]) == card.classes
    folder = tmp_path / "h5_files/main_split"
    write_h5(folder / "test_objectdataset.h5", labels=[14, 0, 1, 2, 3, 4, 5], mask=np.zeros((7, 32), np.int32))
    rows = rows_of(open_source({**card.source, "folder": str(folder)}), tmp_path)
    assert [row.columns["label"] for row in rows][:2] == ["toilet", "bag"]


def test_slices_change_with_the_files_and_the_options(modelnet: Path, tmp_path: Path) -> None:
    def digests(**options: Any) -> set[str]:
        card = {**load_card("modelnet40").source, "folder": str(modelnet), **options}
        return {piece.digest for piece in open_source(card).slices(3, Folder(tmp_path))}

    first = digests()
    assert first == digests() and not first & digests(label_caption="an object: {}")
    write_h5(modelnet / "ply_data_test0.h5", CLOUDS[:6], np.arange(6) % 3)
    assert not first & digests()


def test_a_class_number_without_a_name_is_a_row_with_a_problem(tmp_path: Path) -> None:
    write_h5(tmp_path / "a.h5", labels=[0, 9, 0, 0, 0, 0, 0])
    source = Hdf5Points(folder=str(tmp_path), files=("a.h5",), classes=("chair", "table"))
    rows = rows_of(source, tmp_path)
    assert [row.problem is None for row in rows] == [True, False, True, True, True, True, True]
    assert rows[1].problem is not None and rows[1].problem.error_class == "unknown_class"
    with pytest.raises(DataError, match="class number 9 of 2 classes"):
        source.labels()


def external(path: Path) -> None:
    secret = write_h5(path.parent / "secret.h5")
    with h5py.File(path, "w") as file:
        file["data"] = h5py.ExternalLink(str(secret), "data")
        file["label"] = np.zeros(7, int)


def virtual(path: Path) -> None:
    secret = write_h5(path.parent / "secret.h5")
    layout = h5py.VirtualLayout(CLOUDS.shape, "f4")
    layout[...] = h5py.VirtualSource(str(secret), "data", CLOUDS.shape)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("data", layout)
        file["label"] = np.zeros(7, int)


def truncated(path: Path) -> None:
    path.write_bytes(write_h5(path).read_bytes()[:200])


def hollow(clouds: tuple[int, ...], labels: tuple[int, ...]) -> Any:
    """Arrays that have a shape and no content."""

    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name, shape, kind in (("data", clouds, "f4"), ("label", labels, "i8")):
                file.create_dataset(name, shape=shape, dtype=kind, chunks=tuple(min(side, 64) for side in shape))

    return make


def replaced(name: str, value: Any) -> Any:
    """A file with another value in place of an array."""

    def make(path: Path) -> None:
        write_h5(path)
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = value

    return make


CLAIMS = "a.h5: the array data has the shape .*, but only 0 bytes in the file"
BROKEN = {
    "a header of 10^9 clouds": (hollow((10**9, 2048, 3), (10**9,)), CLAIMS),
    "a header of 10^9 points": (hollow((2, 10**9, 3), (2,)), CLAIMS),
    "a large cloud": (
        lambda path: write_h5(path, np.zeros((1, 4_000_001, 3), np.float16)),
        "clouds of 4,000,001 points",
    ),
    "a wide cloud": (lambda path: write_h5(path, np.zeros((2, 4, 65))), r"expected clouds \[M, N, 3\]"),
    "labels in a row": (lambda path: write_h5(path, labels=[[0] * 7]), "and M whole class numbers"),
    "text": (lambda path: path.write_text("no HDF5"), "is no readable HDF5 file"),
    "truncated": (truncated, "is no readable HDF5 file"),
    "flat": (lambda path: write_h5(path, CLOUDS[0]), r"expected clouds \[M, N, 3\]"),
    "too few labels": (lambda path: write_h5(path, labels=[0]), "and M whole class numbers"),
    "labels that are no numbers": (lambda path: write_h5(path, labels=[0.5] * 7), "and M whole class numbers"),
    "a scalar of clouds": (replaced("data", 5.0), r"expected clouds \[M, N, 3\]"),
    "a scalar of labels": (replaced("label", 5), "and M whole class numbers"),
    "clouds without a shape": (replaced("data", h5py.Empty("f4")), "has no arrays data and label"),
    "labels without a shape": (replaced("label", h5py.Empty("i4")), "has no arrays data and label"),
    "an external link": (external, "has no arrays data and label"),
    "a virtual array": (virtual, "has no arrays data and label"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name: str, tmp_path: Path) -> None:
    make, message = BROKEN[name]
    make(tmp_path / "a.h5")
    source = Hdf5Points(folder=str(tmp_path), files=("a.h5",), classes=("chair",))
    with pytest.raises(DataError, match=message):
        list(source.slices(3, Folder(tmp_path / "scratch")))


def test_a_damaged_part_of_a_file_costs_the_clouds_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten clouds of five chunks; the second chunk cannot be unpacked. Clouds are read in blocks of three."""
    monkeypatch.setattr(hdf5_points, "BLOCK", 3 * 32 * 3 * 4)
    clouds = RANDOM.normal(0, 1, (10, 32, 3)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("data", data=clouds, chunks=(2, 32, 3), compression="gzip")
        file["label"] = np.zeros(10, int)
        where = made.id.get_chunk_info(1)
    body = bytearray((tmp_path / "a.h5").read_bytes())
    body[where.byte_offset : where.byte_offset + where.size] = bytes(where.size)
    (tmp_path / "a.h5").write_bytes(body)
    rows = rows_of(Hdf5Points(folder=str(tmp_path), files=("a.h5",), classes=("chair",)), tmp_path, at_once=7)
    reasons = [row.problem.error_class if row.problem else "" for row in rows]
    assert reasons == ["", "", "damaged", "damaged", *[""] * 6]
    for number in (0, 1, 4, 9):
        np.testing.assert_array_equal(points_of(rows[number]), clouds[number])


def test_doubles_that_float32_cannot_resolve_are_rows_with_a_problem(tmp_path: Path) -> None:
    clouds = CLOUDS.astype(np.float64)
    clouds[1] += 5e6
    clouds[2, 0, 0] = 1e300
    write_h5(tmp_path / "a.h5", clouds)
    rows = rows_of(Hdf5Points(folder=str(tmp_path), files=("a.h5",), classes=("a", "b", "c")), tmp_path)
    assert [row.problem.error_class if row.problem else "" for row in rows] == ["", "too_far", *[""] * 5]
    np.testing.assert_array_equal(points_of(rows[0]), CLOUDS[0])
    assert np.isinf(points_of(rows[2])[0, 0])  # not_finite when it is encoded


def test_settings_of_files(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no such file or folder"):
        list(Hdf5Points(folder=str(tmp_path), files=("a.h5",), classes=("x",)).slices(1, Folder(tmp_path)))
    with pytest.raises(SettingError, match="no such file or folder"):
        list(Hdf5Points(folder=str(tmp_path), files=("a.txt",), classes=("x",)).slices(1, Folder(tmp_path)))
    with pytest.raises(SettingError, match="classes: nothing given"):
        list(Hdf5Points(folder=str(tmp_path), files=("a.h5",)).slices(1, Folder(tmp_path)))
    with pytest.raises(SettingError, match="classes: got"):
        Hdf5Points(folder="x", files=("a.h5",), classes=("x",), class_file="y.txt")


@pytest.mark.parametrize("caption", ["a {name}", "a {} of {}", "a thing", "a {", "a {{}}", "a {0}", "a {:>5}"])
def test_captions_have_one_blank(caption: str) -> None:
    with pytest.raises(SettingError, match="^label_caption: got"):
        Hdf5Points(folder="x", files=("a.h5",), classes=("x",), label_caption=caption)


def test_class_folders_with_parts(tmp_path: Path) -> None:
    """ModelNet40's OFF files: airplane/train/airplane_0001.off."""
    for name in ("airplane/train/airplane_1", "airplane/test/airplane_2", "xbox/train/xbox_1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.off").write_bytes(b"OFF3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    source = ImageFolder(folder=str(tmp_path), media=("points",), within="train")
    rows = rows_of(source, tmp_path / "scratch")
    assert [(row.url, row.columns["label"]) for row in rows] == [
        ("airplane/train/airplane_1.off", "airplane"),
        ("xbox/train/xbox_1.off", "xbox"),
    ]


def test_drawn_solids_are_the_same_on_every_machine_and_differ_from_each_other(tmp_path: Path) -> None:
    source = Drawn(points=True, split="solids", samples=32, cloud_points=64)
    rows = rows_of(source, tmp_path)
    assert source.media == ("points",) and source.labels() == [row.columns["label"] for row in rows]
    assert {row.columns["label"] for row in rows} == set(SOLIDS)
    again = rows_of(Drawn(points=True, split="solids", samples=4, first=8, cloud_points=64), tmp_path, at_once=2)
    assert [row.body("points") for row in again] == [row.body("points") for row in rows[8:12]]
    assert len({row.body("points") for row in rows}) == 32
    extents = [extent_of(points_of(row)) for row in rows]
    assert all(points_of(row).shape == (64, 3) for row in rows) and max(extents) / min(extents) > 100


def test_captions_name_the_solid_and_never_a_novel_one_in_training(tmp_path: Path) -> None:
    rows = rows_of(Drawn(points=True, split="train", samples=120, cloud_points=16, captions=3), tmp_path, 60)
    for row in rows:
        label = str(row.columns["label"])
        texts = row.columns["captions"]
        assert isinstance(texts, list) and len(texts) == 3 and row.caption == texts[0]
        assert all(any(word in str(text).lower() for word in (label, *SYNONYMS[label])) for text in texts)
        assert label not in NOVEL_SOLIDS
    assert len(NOVEL_SOLIDS) == 4 and len(SOLIDS) == 16


@pytest.mark.parametrize("name", SOLIDS)
def test_surfaces_are_closed_but_for_shells(name: str) -> None:
    """Every edge of a closed surface belongs to two triangles; corners count by their place."""
    corners, faces = MESHES[name]()
    assert np.isfinite(corners).all() and faces.min() >= 0 and faces.max() < len(corners)
    places = np.unique(corners.round(6), axis=0, return_inverse=True)[1].reshape(-1)[faces]
    edges = np.sort(np.concatenate([places[:, [0, 1]], places[:, [1, 2]], places[:, [2, 0]]]), axis=1)
    edges = edges[edges[:, 0] != edges[:, 1]]  # of triangles at a pole
    _, counts = np.unique(edges, axis=0, return_counts=True)
    is_open = name in ("bowl", "vase", "pyramid")
    assert is_open or (counts % 2 == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "solids"}, "^split: got 'solids'"),
        ({"split": "relations", "points": True}, "^split: got 'relations', expected with points one of train, val"),
        ({"points": True, "video": True}, "^points: got True"),
        ({"points": True, "sound": "beside"}, "^points: got True"),
        ({"points": True, "cloud_points": 3}, "^cloud_points: got 3"),
    ],
)
def test_settings_of_drawn_solids(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Drawn(**options)


def test_old_digests_stay() -> None:
    """Folders of drawn images from before there were solids stay valid."""
    (piece,) = Drawn(samples=3).slices(10, Folder("/nowhere"))
    assert piece.digest == next(Drawn(samples=3, cloud_points=99).slices(10, Folder("/nowhere"))).digest
