"""COCO's and LVIS's files, valid and broken, their images, and the annotations that are kept."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import ClipmillError, DataError, SettingError, SnapshotError
from pipeline.shards.objects import read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.segmentation import mask_of
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.sources.coco import Coco
from pipeline.sources.source import Row
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.settings import Renewal
from pipeline.stages.shard_tasks import Workers
from tests.conftest import ROOT, Serve, image

POLYGON = [[10.10, 10.0, 30.5, 12.25, 20.0, 40.75]]
RUNS = {"size": [72, 72], "counts": [720, 30, 42, 30, 4362]}
TEXT = {"size": [72, 72], "counts": "j4n0Z1000Sh1A\\XN000cg2"}
NO_RAY = Workers(processes_count=0)


def annotation(number: int, image: int, category: int, bbox: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, "area": 99.5, **more}


def instances() -> dict[str, Any]:
    """Three images, the last without objects; ids have gaps, the classes are in no order."""
    return {
        "info": {"year": 2017},
        "images": [
            {
                "id": 139,
                "width": 72,
                "height": 72,
                "file_name": "000139.jpg",
                "coco_url": "http://a.b/val2017/000139.jpg",
            },
            {
                "id": 7,
                "width": 72,
                "height": 72,
                "file_name": "000007.jpg",
                "coco_url": "http://a.b/val2017/000007.jpg",
            },
            {
                "id": 9,
                "width": 72,
                "height": 72,
                "file_name": "000009.jpg",
                "coco_url": "http://a.b/val2017/000009.jpg",
            },
        ],
        "annotations": [
            annotation(1768, 7, 18, [10.10, 10.0, 20.4, 30.75], segmentation=POLYGON),
            annotation(9, 139, 3, [0, 10, 2, 30], segmentation=RUNS, iscrowd=1),
            annotation(2, 7, 17, [40.0, 5, 30, 60], segmentation=[]),
            annotation(3, 139, 17, [1, 2, 3, 4]),
        ],
        "categories": [
            {"id": 18, "name": "dog", "supercategory": "animal"},
            {"id": 3, "name": "car", "supercategory": "vehicle"},
            {"id": 17, "name": "cat", "supercategory": "animal"},
        ],
    }


def lvis() -> dict[str, Any]:
    content = instances()
    for place, one in enumerate(content["images"]):
        del one["file_name"]
        one["neg_category_ids"], one["not_exhaustive_category_ids"] = (
            [[3, 18], [], [17]][place],
            [[], [18, 17], []][place],
        )
    for category, frequency in zip(content["categories"], "rcf", strict=True):
        category["frequency"] = frequency
    return content


@pytest.fixture(name="data")
def data_fixture(tmp_path: Path) -> Path:
    (tmp_path / "val2017").mkdir()
    for number in (139, 7, 9):
        (tmp_path / f"val2017/000{number:03d}.jpg").write_bytes(image(number))
    write(tmp_path, instances())
    return tmp_path


def write(folder: Path, content: Mapping[str, Any], name: str = "instances.json") -> str:
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def rows_of(source: Coco, scratch: Path, at_once: int = 2) -> list[Row]:
    pieces = list(source.slices(at_once, Folder(scratch / "scratch")))
    rows = [row for piece in pieces for row in source.rows(piece)]
    assert len(rows) == sum(piece.count for piece in pieces)
    return rows


def record(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row.members["boxes.json"])
    return found


def test_images_and_boxes_are_what_was_published(data: Path) -> None:
    rows = rows_of(Coco(annotations=str(data / "instances.json"), images=str(data)), data)
    assert [row.url for row in rows] == ["val2017/000139.jpg", "val2017/000007.jpg", "val2017/000009.jpg"]
    assert [row.body("image") for row in rows] == [(data / row.url).read_bytes() for row in rows]
    assert [row.columns["image_id"] for row in rows] == [139, 7, 9]
    names = {3: "car", 17: "cat", 18: "dog"}
    kept = ("bbox", "segmentation", "iscrowd", "area", "id")
    for row in rows:
        mine = [one for one in instances()["annotations"] if one["image_id"] == row.columns["image_id"]]
        expected = [{"label": names[o["category_id"]], **{k: o[k] for k in kept if k in o}} for o in mine]
        assert record(row) == {"width": 72, "height": 72, "objects": expected}
    objects = read_objects(Sample("0", dict(rows[0].members)))
    assert objects.labels == ("car", "cat") and objects.crowd == (True, False) and not objects.federated
    assert mask_of(objects.segmentations[0], 72, 72).sum() == 60
    assert b"10.1," in rows[1].members["boxes.json"] and b"20.4" in rows[1].members["boxes.json"]


def test_a_string_of_runs_survives(data: Path) -> None:
    content = instances()
    content["annotations"][0]["segmentation"] = TEXT
    rows = rows_of(Coco(annotations=write(data, content), images=str(data)), data)
    assert record(rows[1])["objects"][0]["segmentation"] == TEXT
    assert mask_of(TEXT, 72, 72).sum() == 30 * 3 + 15 * 3  # encoded by pycocotools' code: two rectangles


def test_lvis_says_what_was_looked_for(data: Path) -> None:
    (data / "val2017/000009.jpg").unlink()
    rows = rows_of(Coco(annotations=write(data, lvis()), images=str(data)), data)
    assert [row.url for row in rows] == ["val2017/000139.jpg", "val2017/000007.jpg", "val2017/000009.jpg"]
    assert rows[2].problem is not None and rows[1].body("image") == (data / "val2017/000007.jpg").read_bytes()
    objects = [read_objects(Sample("0", dict(row.members))) for row in rows]
    assert [one.negative for one in objects] == [("car", "dog"), (), ("cat",)]
    assert [one.incomplete for one in objects] == [(), ("dog", "cat"), ()]
    assert all(one.federated for one in objects)


@pytest.mark.parametrize(
    ("options", "classes", "labels", "negative"),
    [
        ({}, {"car": "c", "cat": "f", "dog": "r"}, [["car", "cat"], ["dog", "cat"], []], [["car", "dog"], [], ["cat"]]),
        ({"keep": "base"}, {"car": "c", "cat": "f"}, [["car", "cat"], ["cat"], []], [["car"], [], ["cat"]]),
        ({"keep": "novel"}, {"dog": "r"}, [[], ["dog"], []], [["dog"], [], []]),
    ],
)
def test_lvis_frequency_chooses_annotations_not_images(
    data: Path, options: Any, classes: dict[str, str], labels: list[list[str]], negative: list[list[str]]
) -> None:
    source = Coco(annotations=write(data, lvis()), images=str(data / "val2017"), **options)
    rows = rows_of(source, data)
    assert dict(source.classes) == classes and list(source.classes) == list(classes)
    assert [[one["label"] for one in record(row)["objects"]] for row in rows] == labels
    assert [record(row)["negative"] for row in rows] == negative
    assert [row.columns["objects"] for row in rows] == [len(some) for some in labels]


def test_synonyms_of_lvis_are_told_and_label_nothing(data: Path) -> None:
    """Labels use the first name of a class; the classes of the source list all names."""
    content = lvis()
    by_name = {category["name"]: category for category in content["categories"]}
    by_name["cat"]["synonyms"], by_name["dog"]["synonyms"] = ["cat", "kitty", "", "house_cat"], ["hound"]
    source = Coco(annotations=write(data, content), images=str(data / "val2017"))
    labels = [[one["label"] for one in record(row)["objects"]] for row in rows_of(source, data)]
    assert dict(source.classes) == {"car": "c", "cat; kitty; house_cat": "f", "dog; hound": "r"}
    assert labels == [["car", "cat"], ["dog", "cat"], []]
    for word in ("cat", "Cat", "cat; pussy"):
        chosen = Coco(annotations=source.annotations, images=source.images, classes_of=card(data, [word], []))
        assert dict(chosen.classes) == {"cat; kitty; house_cat": "f"}


def card(folder: Path, classes: list[str], novel: list[str]) -> str:
    place = folder / "pets.yaml"
    place.write_text(json.dumps({"name": "pets", "title": "t", "classes": classes, "novel": novel}))
    return str(place)


def test_a_card_chooses_classes(data: Path) -> None:
    options: dict[str, Any] = {"annotations": str(data / "instances.json"), "images": str(data)}
    options["classes_of"] = card(data, ["dog", "cat"], ["cat"])
    assert dict(Coco(**options).classes) == {"cat": "novel", "dog": "base"}
    for keep, labels in {"all": [["cat"], ["dog", "cat"], []], "base": [[], ["dog"], []]}.items():
        rows = rows_of(Coco(**options, keep=keep), data)  # type: ignore[arg-type]
        assert [[one["label"] for one in record(row)["objects"]] for row in rows] == labels
        rows = rows_of(Coco(**options, keep=keep, with_objects=True), data)  # type: ignore[arg-type]
        assert [[one["label"] for one in record(row)["objects"]] for row in rows] == [some for some in labels if some]


def test_settings_that_do_not_fit_the_file(data: Path) -> None:
    options: dict[str, Any] = {"annotations": str(data / "instances.json"), "images": str(data)}
    with pytest.raises(SettingError, match="keep: got 'base'.*a card with novel classes"):
        rows_of(Coco(**options, keep="base"), data)
    with pytest.raises(SettingError, match="it has no zebra"):
        rows_of(Coco(**options, classes_of=card(data, ["dog", "zebra"], [])), data)
    with pytest.raises(SettingError, match=r"images: no such file or folder: .*nowhere"):
        rows_of(Coco(annotations=options["annotations"], images=str(data / "nowhere")), data)
    with pytest.raises(SettingError, match="annotations: nothing given"):
        Coco(annotations="")
    with pytest.raises(SettingError, match="annotations: no such file or folder"):
        rows_of(Coco(annotations=str(data / "none.json")), data)


def test_a_folder_without_any_of_the_images_is_a_setting(data: Path) -> None:
    (data / "empty").mkdir()
    source = Coco(annotations=str(data / "instances.json"), images=str(data / "empty"))
    with pytest.raises(SettingError, match=r"a folder with 000009\.jpg and the others"):
        rows_of(source, data)


def test_captions_are_the_first_of_each_image(data: Path) -> None:
    texts = [{"image_id": 7, "id": 1, "caption": " Two  pets.\n"}, {"image_id": 7, "id": 2, "caption": "no"}]
    captions = write(
        data, {"annotations": [*texts, {"image_id": 9, "id": 3, "caption": "gr\ud800ass"}]}, "captions.json"
    )
    options: dict[str, Any] = {"annotations": str(data / "instances.json"), "images": str(data)}
    assert [row.caption for row in rows_of(Coco(**options, captions=captions), data)] == ["", "Two pets.", "gr?ass"]
    with pytest.raises(SettingError, match="captions: .*image_id and caption"):
        rows_of(Coco(**options, captions=options["annotations"]), data)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([None, "second"], "second"),
        (["", "second"], "second"),
        ([["first", "second"]], "first"),
        ([7], "7"),
        ([{"en": "first"}, "second"], "second"),
    ],
)
def test_one_odd_caption_does_not_end_the_file(
    data: Path, caplog: pytest.LogCaptureFixture, captions: list[Any], expected: str
) -> None:
    records = [{"image_id": 7, "id": number, "caption": text} for number, text in enumerate(captions)]
    path = write(data, {"annotations": [*records, {"image_id": "x", "caption": "no id"}]}, "captions.json")
    rows = rows_of(Coco(annotations=str(data / "instances.json"), images=str(data), captions=path), data)
    assert [row.caption for row in rows if row.caption] == [expected]
    odd = 1 + sum(text in (None, "") or isinstance(text, dict) for text in captions)
    assert f"{odd} of {1 + len(captions)} captions have no text or no image_id" in caplog.text
    assert "2 of 3 images have no caption there" in caplog.text


def test_an_annotation_without_bbox_is_left_out_and_a_file_without_boxes_refused(data: Path) -> None:
    content = instances()
    del content["annotations"][0]["bbox"]
    rows = rows_of(Coco(annotations=write(data, content), images=str(data)), data)
    assert [row.columns["left_out"] for row in rows] == [0, 1, 0]
    for record in content["annotations"]:
        record["bbox"] = {"x": 1, "y": 2, "w": 3, "h": 4}
    with pytest.raises(DataError, match=r"instances.json: none of \d annotations has a bbox of four numbers"):
        rows_of(Coco(annotations=write(data, content), images=str(data)), data)


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        ("categories", {"name": None}, "the category 18 has the name None"),
        ("categories", {"name": ["a", "b"]}, r"the category 18 has the name \['a', 'b'\]"),
        ("images", {"neg_category_ids": "1"}, "has class ids that are no list"),
        ("annotations", {"category_id": None}, "instances.json: an annotation of the image .*: the id None"),
    ],
)
def test_odd_records_are_named_with_their_file(data: Path, part: str, change: dict[str, Any], sentence: str) -> None:
    content = instances()
    content[part][0].update(change)
    with pytest.raises(DataError, match=sentence):
        rows_of(Coco(annotations=write(data, content), images=str(data)), data)


def test_half_an_emoji_in_a_class_name_can_be_stored(data: Path) -> None:
    content = instances()
    content["categories"][0]["name"] = "\ud83d cat"
    source = Coco(annotations=write(data, content), images=str(data))
    rows_of(source, data)
    assert "? cat" in source.classes


@pytest.mark.parametrize(
    ("bbox", "more", "reason"),
    [
        ([5, 5, 0, 10], {}, "no_area"),
        ([5, 5, 10, -4], {}, "no_area"),
        ([100, 5, 10, 10], {}, "outside"),
        ([-10, 5, 10, 10], {}, "outside"),
        ([5, float("nan"), 10, 10], {}, "no_box"),
        ([5, 5, float("inf"), 10], {}, "no_box"),
        ([5, 5, 10], {}, "no_box"),
        (None, {}, "no_box"),
        (["a", 5, 10, 10], {}, "no_box"),
        ("5555", {}, "no_box"),
        ([True, True, True, True], {}, "no_box"),
        ({"x": 1, "y": 2, "w": 3, "h": 4}, {}, "no_box"),
    ],
)
def test_an_unusable_annotation_is_left_out_and_counted(
    data: Path, caplog: pytest.LogCaptureFixture, bbox: Any, more: dict[str, Any], reason: str
) -> None:
    content = instances()
    usual = [annotation(100 + number, 9, 3, [number, number, 5, 5]) for number in range(20)]
    content["annotations"] += [*usual, annotation(50, 7, 3, bbox, **more)]
    rows = rows_of(Coco(annotations=write(data, content), images=str(data)), data)
    assert [row.columns["left_out"] for row in rows] == [0, 1, 0]
    assert [one["label"] for one in record(rows[1])["objects"]] == ["dog", "cat"]
    assert f"1 annotations left out ({reason})" in caplog.text


@pytest.mark.parametrize(
    ("segmentation", "kept", "reason"),
    [
        (POLYGON[0], POLYGON, ""),  # a polygon without its list
        ([*POLYGON, [30, 30]], POLYGON, ""),
        ([[]], [[]], ""),
        (None, None, ""),
        ([[5, 5, 30, 40]], "none", "two_points"),  # two corners, or x, y, width, height
        ([5, 5, 30, 40], "none", "two_points"),
        ([[*POLYGON[0], 7]], "none", "odd_coordinates"),
        ([[1, 2, float("nan"), 3, 4, 5]], "none", "not_finite"),
        ({"size": [36, 144], "counts": [5184]}, "none", "other_size"),
        ({"size": [72, 72], "counts": [720, 30]}, "none", "wrong_runs"),
        ({"size": [72, 72], "counts": [-16, 5200]}, "none", "wrong_runs"),
        ({"counts": [5184]}, "none", "no_mask_format"),
        ("polygon", "none", "no_mask_format"),
        (["123456"], "none", "no_mask_format"),  # no list of numbers, though each letter is one
        ([{"1": 1, "2": 2, "3": 3, "4": 4, "5": 5, "6": 6}], "none", "no_mask_format"),
        ([None], [None], ""),
        ([None, *POLYGON], POLYGON, ""),
        ({"size": [72, 72], "counts": {"5184": 1}}, "none", "no_mask_format"),
        ({"size": [72, 72], "counts": [10.5, 20, 5153.5]}, "none", "wrong_runs"),
        ({"size": [72, 72], "counts": "o" * 100_000}, "none", "no_mask_format"),  # one number of half a million bits
        ([{"x": 1, "y": 2}], "none", "no_mask_format"),
    ],
)
def test_segmentations_are_judged_once(
    data: Path, caplog: pytest.LogCaptureFixture, segmentation: Any, kept: Any, reason: str
) -> None:
    content = instances()
    content["annotations"][0]["segmentation"] = segmentation
    rows = rows_of(Coco(annotations=write(data, content), images=str(data)), data)
    found = record(rows[1])["objects"]
    assert found[0].get("segmentation", "none") == kept and found[0]["bbox"] == [10.10, 10.0, 20.4, 30.75]
    assert [row.columns["left_out"] for row in rows] == [0, 0, 0]
    assert (f"1 segmentations left out ({reason})" in caplog.text) == bool(reason)
    read = read_objects(Sample("0", dict(rows[1].members)))
    assert (read.segmentations[0] is not None) == (kept == POLYGON)


@pytest.mark.parametrize(
    ("more", "crowd", "area"),
    [
        ({"iscrowd": "0"}, False, 99.5),
        ({"iscrowd": False}, False, 99.5),
        ({"iscrowd": None}, False, 99.5),
        ({"iscrowd": "1"}, True, 99.5),
        ({"iscrowd": True}, True, 99.5),
        ({"area": float("nan")}, False, 20.0 * 30.0),
        ({"area": "wide"}, False, 20.0 * 30.0),
        ({"area": None}, False, 20.0 * 30.0),
        ({"area": "7.5"}, False, 7.5),
    ],
)
def test_crowds_and_areas_as_tools_write_them(data: Path, more: dict[str, Any], crowd: bool, area: float) -> None:
    content = instances()
    content["annotations"][0] = annotation(1, 7, 18, [10, 10, 20, 30], **more)
    rows = rows_of(Coco(annotations=write(data, content), images=str(data)), data)
    objects = read_objects(Sample("0", dict(rows[1].members)))
    assert objects.crowd[0] is crowd and objects.areas[0] == area
    member = {"width": 72, "height": 72, "objects": [{"label": "dog", "bbox": [10, 10, 20, 30], **more}]}
    if "area" not in more:  # the same where a tar of another tool holds it
        assert read_objects(Sample("0", {"boxes.json": json.dumps(member).encode()})).crowd == (crowd,)


def test_ids_as_text_and_a_byte_order_mark(data: Path) -> None:
    content = instances()
    for one in content["annotations"]:
        one["image_id"], one["category_id"] = str(one["image_id"]), float(one["category_id"])
    written = write(data, content)
    Path(written).write_bytes(b"\xef\xbb\xbf" + Path(written).read_bytes())
    rows = rows_of(Coco(annotations=written, images=str(data)), data)
    assert [row.columns["objects"] for row in rows] == [2, 2, 0]


def named(data: Path, *names: str, at: str = "val2017") -> list[str]:
    """The paths that images with these file names get."""
    content = instances()
    for one, name in zip(content["images"], names, strict=True):
        one.pop("coco_url")
        one["file_name"] = name
    return [row.url for row in rows_of(Coco(annotations=write(data, content), images=str(data / at)), data)]


def test_file_names_of_windows_and_of_other_folders(data: Path) -> None:
    plain = ["000139.jpg", "000007.jpg", "000009.jpg"]
    assert named(data, *[f"images\\{name}" for name in plain]) == plain
    assert named(data, plain[0], *[f"..\\..\\media\\{name}" for name in plain[1:]]) == plain
    below = [f"val2017/{name}" for name in plain]
    assert named(data, *[f"val2017\\{name}" for name in plain], at="") == below
    assert named(data, *[f"C:\\data\\val2017\\{name}" for name in plain], at="") == below
    assert named(data, *[f"/home/me/val2017/{name}" for name in plain], at="") == below


def test_the_file_of_another_image_is_not_taken_for_a_missing_one(data: Path) -> None:
    (data / "b").mkdir()
    (data / "b/1.jpg").write_bytes(image(1))
    (data / "2.jpg").write_bytes(image(2))
    assert named(data, "val2017/000139.jpg", "b/1.jpg", "b/2.jpg", at="")[2] == "b/2.jpg"
    content = instances()
    content["images"][2] |= {"file_name": "b/2.jpg", "coco_url": ""}
    content["images"][1] |= {"file_name": "b/1.jpg", "coco_url": ""}
    content["images"][0] |= {"file_name": "val2017/000139.jpg"}
    rows = rows_of(Coco(annotations=write(data, content), images=str(data)), data)
    assert [row.problem is None for row in rows] == [True, True, False]


def test_records_of_one_file_are_refused(data: Path) -> None:
    with pytest.raises(DataError, match="the images 139 and 9 are both 000139.jpg: merge"):
        named(data, "000139.jpg", "000007.jpg", "000139.jpg")
    with pytest.raises(DataError, match="the images 139 and 7 are both 000139.jpg"):
        named(data, "a/000139.jpg", "b/000139.jpg", "b/000009.jpg")


def test_a_box_that_sticks_out_stays(data: Path) -> None:
    content = instances()
    content["annotations"][0]["bbox"] = [60, 60, 12.7, 12.3]
    rows = rows_of(Coco(annotations=write(data, content), images=str(data)), data)
    assert record(rows[1])["objects"][0]["bbox"] == [60, 60, 12.7, 12.3]
    assert rows[1].columns["left_out"] == 0


def boxes(seed: int, count: int = 200) -> np.ndarray[Any, Any]:
    """Boxes x, y, width, height anywhere in an image of 72 x 72."""
    random = np.random.default_rng(seed)
    sides = random.uniform(2, 60, (count, 2))
    return np.concatenate([random.uniform(0, 1, (count, 2)) * (72 - sides), sides], axis=1)


def of_boxes(data: Path, found: np.ndarray[Any, Any]) -> Coco:
    content = instances()
    content["annotations"] = [annotation(n, 7, 3, box.round(2).tolist()) for n, box in enumerate(found)]
    return Coco(annotations=write(data, content), images=str(data))


@pytest.mark.parametrize("seed", range(5))
def test_the_whole_file_tells_what_boxes_are_meant(data: Path, seed: int) -> None:
    right = boxes(seed)
    assert rows_of(of_boxes(data, right), data)[1].columns["objects"] == 200
    corners = np.concatenate([right[:, :2], right[:, :2] + right[:, 2:]], axis=1)
    with pytest.raises(DataError, match="none as x1, y1, x2, y2"):
        rows_of(of_boxes(data, corners), data)
    corners[:2] = [[60, 60, 5, 5], [10, 10, 90, 90]]
    with pytest.raises(DataError, match="and 2 as x1, y1, x2, y2"):
        rows_of(of_boxes(data, corners), data)
    with pytest.raises(DataError, match="images of another size"):
        rows_of(of_boxes(data, right * 2), data)
    with pytest.raises(DataError, match="shares of the image's sides"):
        rows_of(of_boxes(data, right / 72), data)


def broken() -> Iterator[tuple[dict[str, Any], str]]:
    """Inconsistent files and their error messages."""

    def changed(part: str, place: int, **more: Any) -> dict[str, Any]:
        content = instances()
        content[part][place].update(more)
        return content

    yield changed("categories", 0, id=3), "the category id 3 is there twice"
    yield changed("categories", 0, name="cat"), "the category name 'cat' is there twice"
    yield changed("categories", 0, name="Cat; tom"), "the category name 'cat' is there twice"
    yield changed("categories", 0, synonyms="kitty"), "not as COCO's files are .*synonyms 'kitty'"
    yield changed("images", 0, id=9), "the image id 9 is there twice"
    yield changed("annotations", 0, image_id=5), "1 annotations name an unknown image id, such as 5"
    yield changed("annotations", 0, category_id=5), "an unknown category id, such as 5"
    yield changed("annotations", 0, category_id="dog"), "the id 'dog' is no whole number"
    yield changed("annotations", 0, image_id=[7]), r"the id \[7\] is no whole number"
    yield changed("images", 1, id=20230101123045123457), "20230101123045123457 is no whole number of at most 64 bits"
    yield changed("images", 1, id="img-7"), "'img-7' is no whole number"
    yield changed("images", 1, neg_category_ids=[99]), "an unknown category id, such as 99"
    yield changed("images", 1, width=0), "the image 7 has the width 0, not a number of pixels"
    yield changed("images", 1, width="wide"), "has the width 'wide', not"
    yield changed("images", 1, height=None), "has the height None, not"
    yield changed("images", 1, file_name="\ud800.jpg"), "not as COCO's files are"
    yield changed("categories", 1, frequency="often"), "of frequency 'often'"
    yield changed("categories", 1, name=" "), "called ' '"
    yield {**instances(), "annotations": [{"image_id": 7, "caption": "two pets"}]}, "has not image_id and category_id"
    yield {**instances(), "images": []}, "at least one image"
    yield {**instances(), "images": [3]}, "the image 3 is no object"
    yield {**instances(), "categories": [[]]}, r"the category \[\] is no object"
    yield {**instances(), "categories": [{"id": 3}]}, "a record without 'name'"
    yield {"images": [], "annotations": []}, "it has no list categories"
    yield {"images": {}, "annotations": [], "categories": []}, "it has no list images"


@pytest.mark.parametrize(("content", "sentence"), list(broken()), ids=[sentence for _, sentence in broken()])
def test_a_file_that_contradicts_itself_is_refused(data: Path, content: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ClipmillError, match=sentence):
        rows_of(Coco(annotations=write(data, content), images=str(data)), data)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"images": '])
def test_what_is_no_such_file_is_a_setting(data: Path, content: bytes) -> None:
    (data / "broken.json").write_bytes(content)
    with pytest.raises(SettingError, match="annotations: .*COCO's or LVIS's instances"):
        rows_of(Coco(annotations=str(data / "broken.json")), data)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd"])
def test_an_image_outside_the_folder_is_not_read(data: Path, name: str) -> None:
    content = instances()
    content["images"][0].update(file_name=name, coco_url="")
    (data / "secret.jpg").write_bytes(b"secret")
    source = Coco(annotations=write(data, content), images=str(data / "val2017"))
    assert [row.body("image") is None for row in rows_of(source, data)] == [True, False, False]
    with pytest.raises(DataError, match="has no address"):
        rows_of(Coco(annotations=source.annotations, images="" if "etc" in name else "https://a.b/c"), data)


def test_addresses_are_the_published_ones_or_of_the_prefix(data: Path) -> None:
    source = Coco(annotations=str(data / "instances.json"))
    assert source.downloads and not source.has_captions
    assert [row.url for row in rows_of(source, data)][0] == "http://a.b/val2017/000139.jpg"
    rows = rows_of(Coco(annotations=source.annotations, images="https://mirror.org/coco/"), data)
    assert [(row.url, row.body("image")) for row in rows][1] == ("https://mirror.org/coco/000007.jpg", None)


def as_it_is(**downloads: Any) -> ShardOptions:
    images = ImageOptions(resize_mode="no", skip_reencode=True)
    return ShardOptions(
        media=MediaOptions(image=images), downloads=DownloadOptions(**downloads), number_sample_per_shard=2
    )


def stored(folder: Path) -> list[Sample]:
    snapshot = read_snapshot(str(folder))
    return [sample for shard in snapshot.shards for sample in iterate_tar(Folder(folder).open(shard.tar))]


def test_a_refresh_downloads_the_images(data: Path, serve: Serve) -> None:
    web = serve({f"coco/{name}": (data / "val2017" / name).read_bytes() for name in ("000139.jpg", "000009.jpg")})
    source = Coco(annotations=str(data / "instances.json"), images=f"{web.url}/coco", keep="all")
    snapshot = refresh(source, Folder(data / "out"), as_it_is(allow_hosts=("127.0.0.1",)), NO_RAY)
    assert snapshot.samples == 2 and snapshot.rows == 3 and sum(snapshot.dropped.values()) == 1
    assert snapshot.options["classes"] == {"car": "", "cat": "", "dog": ""}
    assert read_snapshot(str(data / "out")).options["classes"] == {"car": "", "cat": "", "dog": ""}
    found = stored(data / "out")
    assert [read_objects(one).labels for one in found] == [("car", "cat"), ()]
    assert found[0].fields["jpg"] == (data / "val2017/000139.jpg").read_bytes()


def test_images_of_another_size_and_resized_ones_are_no_samples(data: Path) -> None:
    (data / "val2017/000007.jpg").write_bytes(image(7, side=80))
    source = Coco(annotations=str(data / "instances.json"), images=str(data))
    snapshot = refresh(source, Folder(data / "out"), as_it_is(), NO_RAY)
    assert snapshot.dropped == {"stale_annotation": 1} and snapshot.samples == 2
    with pytest.raises(SnapshotError, match="use --resize-mode no"):
        refresh(
            source, Folder(data / "small"), ShardOptions(media=MediaOptions(image=ImageOptions(image_size=32))), NO_RAY
        )


def test_images_that_are_displayed_turned(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Boxes of the displayed images fit with the option that turns them; the row, or a warning, names it."""
    for number, size, orientation in ((139, (72, 72), 3), (7, (60, 72), 6)):
        exif = Image.Exif()
        exif[274] = orientation
        Image.new("RGB", size).save(data / f"val2017/000{number:03d}.jpg", exif=exif)
    content = instances()
    content["images"][1] |= {"width": 72, "height": 60}  # as displayed
    content["annotations"][2]["bbox"] = [40.0, 5, 30, 50]
    source = Coco(annotations=write(data, content), images=str(data))
    snapshot = refresh(source, Folder(data / "out"), as_it_is(), NO_RAY)
    assert snapshot.dropped == {"stale_annotation": 1}
    assert "2 of 2 images have an EXIF orientation" in caplog.text and "--apply-exif-orientation" in caplog.text
    shard = pq.read_table(data / "out" / f"{snapshot.shards[0].name}.parquet").to_pylist()
    assert "use --apply-exif-orientation" in shard[1]["error_message"]
    options = as_it_is()
    turning = replace(options, media=MediaOptions(image=replace(options.media.image, apply_exif_orientation=True)))
    assert refresh(source, Folder(data / "turned"), turning, NO_RAY).samples == 3


def test_a_refresh_sees_boxes_that_have_changed(data: Path) -> None:
    source = Coco(annotations=str(data / "instances.json"), images=str(data))
    refresh(source, Folder(data / "out"), as_it_is(), NO_RAY)
    content = instances()
    content["annotations"][0]["bbox"] = [11, 11, 20, 30]
    write(data, content)
    renewed = refresh(source, Folder(data / "out"), as_it_is(), NO_RAY, renewal=Renewal(parent="latest"))
    assert renewed.samples == 3 and renewed.options["classes"]
    boxes_of = {read_objects(one).labels: read_objects(one).boxes[0].tolist() for one in stored(data / "out")[-1:]}
    assert boxes_of == {("dog", "cat"): [11, 11, 31, 41]}


def test_the_job_reads_coco(data: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs/refresh_dataset.py"), "coco", "--output-folder", str(data / "out")]
    options = {"annotations": str(data / "instances.json"), "images": str(data / "val2017")}
    options["classes-of"] = card(data, ["dog", "cat"], ["cat"])
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [*command, *flags, "--keep", "base", "--processes-count", "0"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    snapshot = read_snapshot(str(data / "out"))
    assert snapshot.samples == 3 and snapshot.card == options["classes-of"]
    assert snapshot.options["classes"] == {"dog": "base"}
