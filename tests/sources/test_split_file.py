"""Published split files, malformed ones, and selected rows of other sources."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset import card_names, load_card
from pipeline.errors import ClipmillError, DataError, SettingError
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.folder import ImageFolder
from pipeline.sources.picked import Picked
from pipeline.sources.source import Row, Source
from pipeline.sources.split_file import Item, SplitFile
from tests.conftest import image

SPLIT = {
    "train": [["b/2.jpg", 1, "sea lake"], ["a/1.jpg", 0, "AnnualCrop"], ["b/1.jpg", 1, "sea lake"]],
    "val": [["a/2.jpg", 0, "AnnualCrop"]],
    "test": [["c/1.jpg", 2, "noise"], ["a/3.jpg", 0, "AnnualCrop"]],
}


def rows_of(source: Source, scratch: Path, at_once: int = 2) -> list[Row]:
    pieces = list(source.slices(at_once, Folder(scratch)))
    rows = [row for piece in pieces for row in source.rows(piece)]
    assert len(rows) == sum(piece.count for piece in pieces)
    return rows


@pytest.fixture(name="pets")
def pets_fixture(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    for number, (path, *_) in enumerate(row for part in SPLIT.values() for row in part):
        place = folder / "images" / str(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image(number))
    (folder / "split.json").write_text(json.dumps(SPLIT))
    return folder


def test_a_split_in_json_keeps_its_order_and_renames(pets: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": str(pets), "pictures": "images", "split": "split.json"}
    source = SplitFile(**options, renames={"AnnualCrop": "Annual Crop Land"})
    rows = rows_of(source, tmp_path)
    assert [row.url for row in rows] == ["images/b/2.jpg", "images/a/1.jpg", "images/b/1.jpg"]
    assert [row.columns["class_number"] for row in rows] == [1, 0, 1]
    assert [row.columns["label"] for row in rows] == ["sea lake", "Annual Crop Land", "sea lake"]
    assert rows[1].body("image") == (pets / "images/a/1.jpg").read_bytes()
    test = SplitFile(**options, part="test", leave_out=("noise",))
    assert test.items == (Item("a/3.jpg", 0, "AnnualCrop"),)


def test_an_image_that_is_not_there_is_a_problem_of_its_row(pets: Path, tmp_path: Path) -> None:
    (pets / "images/a/1.jpg").unlink()
    rows = rows_of(SplitFile(folder=str(pets), pictures="images", split="split.json"), tmp_path)
    assert [row.problem is None for row in rows] == [True, False, True]


def test_a_missing_split_file_says_where_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "oxford_pets").mkdir()
    card = load_card("oxford_pets")
    source = open_source({**card.source, "folder": str(tmp_path / "oxford_pets")})
    assert isinstance(source, SplitFile)
    with pytest.raises(SettingError, match=r"split_zhou_OxfordPets\.json, which comes from .*DATASETS\.md"):
        source.items  # noqa: B018
    with pytest.raises(SettingError, match="folder: nothing given"):
        SplitFile(split="x.json").items  # noqa: B018


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[]", "no split file of the form"),
        (b"{nonsense", "no split file of the form"),
        (b'{"val": [], "test": []}', "no split file of the form"),
        (b'{"train": [["a.jpg", 0]]}', "no split file of the form"),
        (b'{"train": [["a.jpg", "0", "cat"]]}', "no \\[path below the folder"),
        (b'{"train": [["../a.jpg", 0, "cat"]]}', "no \\[path below the folder"),
        (b'{"train": [["/etc/a.jpg", 0, "cat"]]}', "no \\[path below the folder"),
        (b'{"train": [["a.jpg", -1, "cat"]]}', "no \\[path below the folder"),
        (b'{"train": [["a.jpg", 0, "cat"], ["b.jpg", 0, "dog"]]}', "calls the class 0 'cat' and 'dog'"),
        (b"\xff\xfe\x00", "is no text"),
        (b'{"train": []}', "a folder with images"),
    ],
)
def test_broken_split_files(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "split.json").write_bytes(content)
    with pytest.raises(ClipmillError, match=sentence):
        SplitFile(folder=str(tmp_path), split="split.json").items  # noqa: B018


def test_the_files_of_fgvc_aircraft(tmp_path: Path) -> None:
    (tmp_path / "variants.txt").write_text("707-320\n727-200\nA300B4\n")
    (tmp_path / "images_variant_val.txt").write_text("0034309 A300B4\n0056978 707-320\n")
    source = SplitFile(folder=str(tmp_path), split="variants.txt", format="aircraft", part="val")
    assert source.items == (Item("0034309.jpg", 2, "A300B4"), Item("0056978.jpg", 0, "707-320"))
    (tmp_path / "images_variant_val.txt").write_text("0034309 Spitfire\n")
    with pytest.raises(DataError, match="Spitfire"):
        SplitFile(folder=str(tmp_path), split="variants.txt", format="aircraft", part="val").items  # noqa: B018


def made(folder: Path, *paths: str) -> str:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")
    return str(folder)


def test_folders_of_imagenet_and_of_parts_of_it(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("n1 tench\nn2 great white shark\nn3 sunglasses\n")
    place = made(tmp_path, "val/n3/b.JPEG", "val/n1/z.JPEG", "val/n3/a.JPEG", "val/README.txt", "val/n9/a.JPEG")
    source = SplitFile(
        folder=place, pictures="val", format="folders", split="classnames.txt", renames={"n3": "sunglass"}
    )
    assert source.items == (
        Item("n1/z.JPEG", 0, "tench"),
        Item("n3/a.JPEG", 2, "sunglass"),
        Item("n3/b.JPEG", 2, "sunglass"),
    )
    numbered = made(tmp_path / "v2", "0/a.jpg", "2/a.jpg")
    (tmp_path / "v2/classnames.txt").write_text("n1 tench\nn2 shark\nn3 ray\n")
    found = SplitFile(folder=numbered, format="folders", split="classnames.txt").items
    assert [(item.number, item.name) for item in found] == [(0, "tench"), (2, "ray")]
    plain = SplitFile(folder=made(tmp_path / "own", "dog/a.jpg", "cat/b.png"), format="folders")
    assert [(item.number, item.name) for item in plain.items] == [(0, "cat"), (1, "dog")]
    with pytest.raises(SettingError, match="a folder with nowhere in it"):
        SplitFile(folder=numbered, pictures="nowhere", format="folders").items  # noqa: B018


def test_all_parts_of_a_folder_set_number_its_classes_alike(tmp_path: Path) -> None:
    """Also a class that one part lacks; hidden folders are no classes."""
    made(tmp_path, "train/ant/a.jpg", "train/cat/a.jpg", "train/.ipynb_checkpoints/a.jpg", "__MACOSX/ant/a.jpg")
    made(tmp_path, "test/bee/a.jpg", "test/cat/a.jpg", "test/__MACOSX/cat/a.jpg", "notes/zebra/a.jpg")
    for part, found in (("train", [(0, "ant"), (2, "cat")]), ("test", [(1, "bee"), (2, "cat")])):
        source = SplitFile(folder=str(tmp_path), pictures=part, format="folders")
        assert [(item.number, item.name) for item in source.items] == found
        assert SplitFile(folder=str(tmp_path / part), format="folders").items == source.items
    made(tmp_path / "plain", "ant/a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/ant/._a.jpg", "ant/._b.jpg")
    pieces = ImageFolder(folder=str(tmp_path / "plain")).slices(10, Folder(tmp_path / "scratch"))
    assert sum(piece.count for piece in pieces) == 1


def test_a_split_file_of_windows(tmp_path: Path) -> None:
    split = {"train": [["a\\1.jpg", 0, "ant"]], "val": [], "test": []}
    (tmp_path / "split.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(split).encode())
    assert SplitFile(folder=str(tmp_path), split="split.json").items == (Item("a/1.jpg", 0, "ant"),)
    split["train"] = [["..\\..\\secret.jpg", 0, "ant"]]
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(DataError, match="below the folder"):
        SplitFile(folder=str(tmp_path), split="split.json").items  # noqa: B018


def names() -> list[str]:
    return [name for name in card_names() if load_card(name).few_shot]


@pytest.mark.parametrize("name", names())
def test_parts_of_cards_are_options_of_their_sources(name: str) -> None:
    card = load_card(name)
    assert card.few_shot is not None and card.few_shot.names
    sources = {part: open_source({**card.source, **more}) for part, more in card.few_shot.parts.items()}
    assert len({repr(source) for source in sources.values()}) == len(sources)  # no part is another one
    assert card.templates or card.few_shot.templates


def test_picked_rows_are_those_of_the_sources_in_the_order_asked_for(pets: Path, tmp_path: Path) -> None:
    drawn = {"kind": "drawn", "split": "colours", "samples": 5, "size": 64}
    split = {"kind": "split-file", "folder": str(pets), "pictures": "images", "split": "split.json"}
    picked = Picked(sources=[drawn, split], numbers=[(1, 2), (0, 4), (1, 0)])
    rows = rows_of(picked, tmp_path / "scratch")
    assert [row.url for row in rows] == ["images/b/1.jpg", "drawn://colours/0/4", "images/b/2.jpg"]
    whole = rows_of(open_source(drawn), tmp_path / "other")
    assert rows[1].body("image") == whole[4].body("image") and dict(rows[1].columns) == {
        "label": whole[4].columns["label"]
    }
    digests = [piece.digest for piece in picked.slices(1, Folder(tmp_path / "scratch"))]
    turned = Picked(sources=[drawn, split], numbers=[(1, 0), (0, 4), (1, 2)])
    assert [piece.digest for piece in turned.slices(1, Folder(tmp_path / "scratch"))] == digests[::-1]
