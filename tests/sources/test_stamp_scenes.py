"""Scenes of stamps: hand-made images whose pixels are known, and (mark `real`) the Debian package itself."""

import json
import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.dataset import load_card
from pipeline.errors import SettingError
from pipeline.shards.objects import read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.source import Row
from pipeline.sources.stamp_classes import CLASSES, NOVEL
from pipeline.sources.stamp_scenes import StampScenes

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
COLOURS = {"apple": RED, "penguin": GREEN, "flag": BLUE}
ONLY = tuple(COLOURS)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools with NumPy 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Apples and flags (base) and penguins (novel), each class of one pure colour, in a transparent border."""
    root = tmp_path / "stamps"
    for number, name in enumerate(("apple_fuji", "apple_green", "apple_red")):
        stamp(root / f"food/fruit/{name}.png", RED, (20 + 10 * number, 30))
    for name in ("red", "green", "blue", "red_mirror"):
        stamp(root / f"town/flags/{name}.png", BLUE, (60, 40))
    for name in ("penguin", "little-penguin"):
        stamp(root / f"animals/birds/{name}.png", GREEN, (40, 50))
    return root


def stamp(path: Path, colour: tuple[int, int, int], size: tuple[int, int]) -> None:
    image = Image.new("RGBA", (size[0] + 20, size[1] + 8), (9, 9, 9, 0))
    image.paste(Image.new("RGBA", size, (*colour, 255)), (5, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def rows_of(source: StampScenes, tmp_path: Path, rows_per_shard: int = 100) -> list[Row]:
    pieces = list(source.slices(rows_per_shard, Folder(tmp_path / "scratch")))
    return [row for piece in pieces for row in source.rows(piece)]


def pixels(row: Row) -> NDArray[np.int64]:
    assert row.body("image") is not None
    return np.asarray(cv2.imdecode(np.frombuffer(row.body("image"), np.uint8), cv2.IMREAD_COLOR_RGB), np.int64)


def masks(row: Row) -> list[tuple[str, NDArray[np.bool_]]]:
    """Label and mask of every object, by the reference decoder."""
    objects = json.loads(row.members["boxes.json"])["objects"]
    found = []
    for obj in objects:
        height, width = obj["segmentation"]["size"]
        code = coco_mask.frPyObjects(obj["segmentation"], height, width)
        found.append((obj["label"], coco_mask.decode(code).astype(bool)))
        assert list(coco_mask.toBbox(code)) == obj["bbox"] and coco_mask.area(code) == obj["area"]
    return found


def test_masks_lie_on_the_pixels_of_their_class(folder: Path, tmp_path: Path) -> None:
    for size in (64, 256):
        rows = rows_of(StampScenes(folder=str(folder), only=ONLY, samples=12, size=size), tmp_path)
        for row in rows:
            image = pixels(row)
            assert image.shape == (size, size, 3)
            claimed = np.zeros((size, size), np.int64)
            for label, mask in masks(row):
                claimed += mask
                inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
                if inner.sum() > 20:  # deep inside, where neither blur nor JPEG mixes it with what is beside it
                    strongest = image[inner].mean(axis=0).argmax()
                    assert strongest == int(np.argmax(COLOURS[label])), label
            assert claimed.max() <= 1  # visible parts do not overlap


def test_a_sample_is_a_function_of_seed_split_and_number(folder: Path, tmp_path: Path) -> None:
    whole = rows_of(StampScenes(folder=str(folder), only=ONLY, samples=6), tmp_path)
    assert rows_of(StampScenes(folder=str(folder), only=ONLY, samples=6), tmp_path, 4) == whole
    assert rows_of(StampScenes(folder=str(folder), only=ONLY, samples=2, first=3), tmp_path) == whole[3:5]
    assert len({row.body("image") for row in whole}) == 6
    for other in (
        StampScenes(folder=str(folder), only=ONLY, samples=6, seed=1),
        StampScenes(folder=str(folder), only=ONLY, samples=6, split="val"),
    ):
        assert not {row.body("image") for row in rows_of(other, tmp_path)} & {row.body("image") for row in whole}


def test_slices_say_what_they_are_made_of(folder: Path, tmp_path: Path) -> None:
    def digests(**options: object) -> list[str]:
        source = StampScenes(folder=str(folder), only=ONLY, **{"samples": 6, **options})  # type: ignore[arg-type]
        return [piece.digest for piece in source.slices(4, Folder(tmp_path))]

    before = digests()
    assert digests() == before and digests(samples=10)[0] == before[0] and digests(samples=10)[1] != before[1]
    assert digests(truth="base")[0] != before[0] and digests(size=64)[0] != before[0]
    stamp(folder / "food/fruit/apple_red.png", RED, (41, 30))
    stamp(folder / "food/fruit/apple_fuji.png", RED, (41, 30))
    assert digests()[0] != before[0]
    changed = digests()
    for name in ("red", "green", "blue"):
        (folder / f"town/flags/{name}.dat").write_text("nomirror\n")
    assert digests() != changed


def test_the_splits_share_no_stamp_and_no_mirrored_one(folder: Path, tmp_path: Path) -> None:
    seen = {}
    for split in ("train", "val"):
        source = StampScenes(folder=str(folder), only=ONLY, split=split, samples=60)  # type: ignore[arg-type]
        records = [json.loads(row.members["boxes.json"]) for row in rows_of(source, tmp_path)]
        seen[split] = {obj["stamp"] for record in records for obj in record["objects"]}
        assert seen[split] == {path for paths in source.stamps.values() for path in paths}
    assert not seen["train"] & seen["val"] and len(seen["train"] | seen["val"]) == 8
    (folder / "town/flags/red.png").unlink()
    (folder / "town/flags/green.png").unlink()
    alone = [StampScenes(folder=str(folder), only=("flag",), split=split).stamps for split in ("train", "val")]  # type: ignore[arg-type]
    assert alone[0] == alone[1] == {"flag": ("town/flags/blue.png",)}


def test_captions_name_all_classes_and_boxes_follow_the_truth_option(folder: Path, tmp_path: Path) -> None:
    everything = rows_of(StampScenes(folder=str(folder), only=ONLY, samples=40), tmp_path)
    base = rows_of(StampScenes(folder=str(folder), only=ONLY, samples=40, truth="base"), tmp_path)
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    for row, known in zip(everything, base, strict=True):
        assert (row.body("image"), row.caption) == (known.body("image"), known.caption) and row.caption is not None
        labels = [label for label, _ in masks(row)]
        named = Counter[str]()
        for number, name in re.findall(r"\b(an?|two|three|four|five) (apple|flag|penguin)s?\b", row.caption):
            assert (number == "an") <= (name == "apple")
            named[name] += numbers[number]
        assert named == Counter(labels) and row.columns["objects"] == len(labels)
        assert [label for label, _ in masks(known)] == [label for label in labels if label != "penguin"]
        main = row.columns["label"]
        assert known.columns["label"] == (None if main == "penguin" else main)
    sizes = [len(masks(row)) for row in everything]
    assert min(sizes) == 1 and max(sizes) >= 4
    assert any("penguin" in (row.caption or "") for row in base)


def test_a_scene_of_one_object_has_a_label(folder: Path, tmp_path: Path) -> None:
    for row in rows_of(StampScenes(folder=str(folder), only=ONLY, samples=12, most_things=1), tmp_path):
        assert [label for label, _ in masks(row)] == [row.columns["label"]]
        objects = read_objects(Sample("0", dict(row.members)))
        assert objects.left_out == 0 and not objects.federated and objects.crowd == (False,)


def test_images_with_something_to_read_are_not_flipped(folder: Path, tmp_path: Path) -> None:
    for name in ("red", "green", "blue"):
        half = Image.new("RGB", (60, 40), (255, 0, 0))
        half.paste((0, 0, 255), (30, 0, 60, 40))
        half.save(folder / f"town/flags/{name}.png")

    def left_is_red() -> set[bool]:
        found = set()
        for row in rows_of(StampScenes(folder=str(folder), only=("flag",), samples=12, most_things=1), tmp_path):
            image, (_, mask) = pixels(row), masks(row)[0]
            x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
            left = image[y + 2 : y + height - 2, x + 2 : x + width // 2 - 2].mean(axis=(0, 1))
            found.add(bool(left[0] > left[2]))
        return found

    assert left_is_red() == {True, False}
    for name in ("red", "green", "blue"):
        (folder / f"town/flags/{name}.dat").write_text("colorable\nnomirror\n")
    assert left_is_red() == {True}


def test_broken_stamps_are_rows_with_a_problem(folder: Path, tmp_path: Path) -> None:
    for name in ("penguin", "little-penguin"):
        (folder / f"animals/birds/{name}.png").write_bytes(b"GIF89a")
    source = StampScenes(folder=str(folder), only=("penguin",), samples=2)
    assert [row.problem and row.problem.error_class for row in rows_of(source, tmp_path)] == ["not_a_png"] * 2
    for name in ("penguin", "little-penguin"):
        Image.new("RGBA", (30, 30), (1, 2, 3, 0)).save(folder / f"animals/birds/{name}.png")
    assert [row.problem and row.problem.error_class for row in rows_of(source, tmp_path)] == ["transparent"] * 2
    good = rows_of(StampScenes(folder=str(folder), only=("apple",), samples=2), tmp_path)
    assert all(row.problem is None and row.body("image") for row in good)


def test_refused_settings(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="folder.*tuxpaint-stamps-default; it has no .*ball"):
        rows_of(StampScenes(folder=str(folder)), tmp_path)
    with pytest.raises(SettingError, match="folder.*apt-get install tuxpaint-stamps-default"):
        rows_of(StampScenes(folder=str(tmp_path / "nowhere")), tmp_path)
    for options, named in (
        ({"size": 32}, "size: got 32.*64 to 512"),
        ({"samples": 0}, "samples: got 0"),
        ({"most_things": 6}, "most_things: got 6.*1 to 5"),
        ({"only": ("unicorn",)}, "only: .*unicorn.*some of apple"),
    ):
        with pytest.raises(SettingError, match=named):
            StampScenes(**options)  # type: ignore[arg-type]


def test_cards_have_the_classes_of_the_source() -> None:
    for name in ("stamp_scenes", "stamp_scenes_val", "stamp_scenes_single"):
        card = load_card(name)
        assert set(card.classes) == set(CLASSES) and set(card.novel) == set(NOVEL) and card.samples
        source = open_source(card.source)
        assert isinstance(source, StampScenes) and source.samples == card.samples
    base = load_card("stamp_scenes_base")
    assert set(base.classes) == set(CLASSES) - set(NOVEL) and base.source["truth"] == "base"
    assert StampScenes().classes == {name: "novel" if name in NOVEL else "base" for name in CLASSES}


@pytest.mark.real
def test_the_package_has_every_class_on_both_sides(package: str, tmp_path: Path) -> None:
    train, val = (StampScenes(folder=package, split=split, samples=30) for split in ("train", "val"))  # type: ignore[arg-type]
    assert set(train.stamps) == set(val.stamps) == set(CLASSES)
    listed = {path for stamps in (train.stamps, val.stamps) for paths in stamps.values() for path in paths}
    for name, places in CLASSES.items():
        assert len(train.stamps[name]) >= 2 and len(val.stamps[name]) >= 1, name
        assert not set(train.stamps[name]) & set(val.stamps[name])
        for place, names in places.items():
            for one in names.split():
                assert one == "*" or f"{place}/{one}.png" in listed, f"{place}/{one}"
    rows = rows_of(train, tmp_path)
    assert all(row.problem is None and masks(row) for row in rows)
