"""Rows of image folders and existing tars; unreadable files are rows with a problem."""

import io
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import SettingError
from pipeline.shards.sample import Sample
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarWriter
from pipeline.sources import open_source
from pipeline.sources.folder import ImageFolder
from pipeline.sources.source import Row, Source
from pipeline.sources.webdataset import WebDatasetTars


def read(source: Source, scratch: Path, rows: int = 2) -> list[Row]:
    return [row for piece in source.slices(rows, Folder(scratch)) for row in source.rows(piece)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, content in {
        "cats/tom.jpg": b"tom",
        "cats/tom.txt": "  a café cat\n".encode(),
        "dogs/rex.PNG": b"rex",
        "dogs/deep/fido.webp": b"fido",
        "top.gif": b"top",
        "notes.md": b"not an image",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path / "in"


def test_a_folder_gives_its_images_captions_and_labels(images: Path, tmp_path: Path) -> None:
    rows = read(ImageFolder(folder=str(images)), tmp_path / "scratch")
    assert [(row.url, row.caption, row.image, row.columns["label"]) for row in rows] == [
        ("cats/tom.jpg", "a café cat", b"tom", "cats"),
        ("dogs/deep/fido.webp", "", b"fido", "dogs"),
        ("dogs/rex.PNG", "", b"rex", "dogs"),
        ("top.gif", "", b"top", ""),
    ]


def test_an_image_that_vanished_is_a_row_with_a_problem(images: Path, tmp_path: Path) -> None:
    source = ImageFolder(folder=str(images))
    pieces = list(source.slices(10, Folder(tmp_path / "scratch")))
    (images / "top.gif").unlink()
    problems = [row.problem for row in source.rows(pieces[0])]
    assert problems[:3] == [None] * 3 and problems[3] is not None and problems[3].status == "failed_to_download"


def test_a_changed_image_changes_the_digest(images: Path, tmp_path: Path) -> None:
    source = ImageFolder(folder=str(images))
    before = [piece.digest for piece in source.slices(2, Folder(tmp_path / "scratch"))]
    (images / "top.gif").write_bytes(b"another")
    after = [piece.digest for piece in source.slices(2, Folder(tmp_path / "scratch"))]
    assert before[0] == after[0] and before[1] != after[1]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SettingError, match="folder"):
            list(ImageFolder(folder=str(place)).slices(2, Folder(tmp_path / "scratch")))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        with open(folder / f"{number:05d}.tar", "wb") as file:
            writer = TarWriter(file)
            for index in range(2):
                json = f'{{"url": "http://x/{number}/{index}", "score": {index}}}'.encode()
                fields = {"png": b"p%d" % index, "txt": b"text", "json": json, "boxes.json": b"[]"}
                writer.write(Sample(f"k{number}{index}", fields))
            writer.close()
    return folder


def test_tars_give_images_captions_columns_and_members(tars: Path, tmp_path: Path) -> None:
    rows = read(WebDatasetTars(tars=str(tars), json_columns=("score",)), tmp_path / "scratch")
    assert [row.url for row in rows] == [f"http://x/{number}/{index}" for number in range(3) for index in range(2)]
    assert {row.caption for row in rows} == {"text"} and [row.image for row in rows] == [b"p0", b"p1"] * 3
    assert rows[1].columns == {"score": "1"} and rows[1].members == {"boxes.json": b"[]"}


def test_brace_ranges_and_joined_parts_name_tars(tars: Path, tmp_path: Path) -> None:
    rows = read(WebDatasetTars(tars=f"{tars}/{{00001..00002}}.tar::{tars}/00000.tar"), tmp_path / "scratch")
    assert [row.url[9] for row in rows] == list("112200")


def test_samples_without_an_image_or_with_broken_json_are_kept_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        writer = TarWriter(file)
        writer.write(Sample("a", {"txt": b"\xff\xfe", "json": b"{"}))
        writer.write(Sample("b", {"jpg": b"x"}))
        writer.close()
    rows = read(WebDatasetTars(tars=str(path)), tmp_path / "scratch")
    assert rows[0].problem is not None and rows[0].problem.error_class == "no_picture"
    assert (rows[1].image, rows[1].caption, rows[1].url) == (b"x", "", "b")


def test_missing_hostile_and_overfull_tars_are_refused(tars: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(hostile, "w") as tar:
        tar.addfile(tarfile.TarInfo("../../etc/passwd.txt"), io.BytesIO())
    for place, rows in ((tmp_path / "no.tar", 2), (hostile, 2), (tmp_path, 2), (tars, 1)):
        if place == tmp_path:
            hostile.unlink()
        with pytest.raises(SettingError):
            list(WebDatasetTars(tars=str(place)).slices(rows, Folder(tmp_path / "scratch")))


def test_a_card_names_its_source(images: Path) -> None:
    opened = open_source({"kind": "folder", "folder": str(images)})
    assert opened == ImageFolder(folder=str(images))
    with pytest.raises(SettingError, match="kind"):
        open_source({"kind": "images"})
    with pytest.raises(SettingError, match="fodler"):
        open_source({"kind": "folder", "fodler": "x"})
