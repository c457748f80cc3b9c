"""Class folders with masks: hand-made images, refreshed and read back as label maps; bad files are problems."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError, SettingError
from pipeline.loaders.classes import base_classes, dataset_classes
from pipeline.loaders.samples import Samples
from pipeline.loaders.segmentation import VOID, LabelClasses
from pipeline.shards.storage import Folder
from pipeline.sources.class_masks import ClassMasks
from pipeline.stages.refresh.make_shard import AS_IT_IS
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.sources.test_folder_and_webdataset import read

MASK = np.array([[0, 127, 128], [0, 255, 255]], np.uint8)


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = encoded(np.zeros((2, 3, 3), np.uint8), "JPEG")
    for name, mask in (("zebra_crossing", MASK), ("ant", np.stack([MASK] * 3, axis=2)), ("void", MASK * 0)):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(image)
        (tmp_path / "in" / name / "1.png").write_bytes(encoded(mask, "PNG"))
    return tmp_path / "in"


def test_masks_become_label_maps_of_their_folders_class(folder: Path, tmp_path: Path) -> None:
    """Grey and coloured masks, an empty one; read back as training reads them."""
    workers = Workers(processes_count=0)
    snapshot = refresh(ClassMasks(folder=str(folder)), Folder(tmp_path / "out"), AS_IT_IS, workers)
    names = ("ant", "void", "zebra crossing")
    assert base_classes("data", snapshot.folder) == names and dataset_classes("data", snapshot.folder) == (names,)
    found = [
        LabelClasses(classes=names).label_map(sample, 2, 3).tolist()
        for sample in map(Samples(snapshot).__getitem__, range(3))
    ]
    nothing = [[VOID] * 3] * 2
    expected = [[[VOID, VOID, number], [VOID, number, number]] for number in (0, 2)]
    assert found == [expected[0], nothing, expected[1]]


def test_the_file_of_classes_chooses_and_orders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("zebra_crossing\n\nant\nant\n")
    source = ClassMasks(folder=str(folder), classes_file=str(tmp_path / "test.txt"))
    assert [row.url for row in read(source, tmp_path / "scratch")] == ["zebra_crossing/1.jpg", "ant/1.jpg"]
    assert list(source.classes) == ["zebra crossing", "ant"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("1.png", None, "no_mask"),
        ("1.png", b"no image", "not_an_image"),
        ("1.png", encoded(np.zeros((3, 2), np.uint8), "PNG"), "mask_size"),
        ("1.png", encoded(MASK, "PNG")[:-30], "mask"),
        ("1.jpg", b"", "not_an_image"),
    ],
    ids=["missing", "text", "size", "cut", "empty"],
)
def test_bad_files_are_rows_with_a_reason(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    bad = folder / "ant" / name
    bad.unlink() if content is None else bad.write_bytes(content)
    first, *others = read(ClassMasks(folder=str(folder)), tmp_path / "scratch")
    assert first.problem is not None and first.problem.error_class == reason
    assert first.columns == {"label": "ant"} and all(row.problem is None for row in others)


def test_a_changed_mask_changes_the_digest(folder: Path, tmp_path: Path) -> None:
    def digests() -> list[str]:
        return [piece.digest for piece in ClassMasks(folder=str(folder)).slices(1, Folder(tmp_path / "scratch"))]

    before = digests()
    (folder / "void" / "1.png").write_bytes(encoded(np.full((2, 3), 255, np.uint8), "PNG"))
    assert [one == other for one, other in zip(before, digests(), strict=True)] == [True, False, True]


def test_wrong_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="folder"):
        ClassMasks(folder="")
    (tmp_path / "flat").mkdir()
    for place in (tmp_path / "missing", tmp_path / "flat"):
        with pytest.raises(SettingError, match="folder"):
            read(ClassMasks(folder=str(place)), tmp_path / "scratch")
    listing = tmp_path / "list.txt"
    with pytest.raises(SettingError, match="classes_file"):
        read(ClassMasks(folder=str(folder), classes_file=str(listing)), tmp_path / "scratch")
    listing.write_text("ant\nlion\n")
    with pytest.raises(SettingError, match="classes_file.*lion"):
        read(ClassMasks(folder=str(folder), classes_file=str(listing)), tmp_path / "scratch")
    listing.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no text"):
        read(ClassMasks(folder=str(folder), classes_file=str(listing)), tmp_path / "scratch")
