"""Label maps from objects and from masks by hand-made cases, and their reader: pixels and labels move together."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import DataError, SettingError
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.detection import RandomResize
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.segmentation import VOID, LabelClasses, SegmentationReader, placed_labels
from pipeline.shards.sample import Sample
from pipeline.shards.segmentation import run_lengths

CLASSES = ("cat", "couch; sofa", "other")


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([number for value in range(256) for number in (value, 255 - value, 7)])
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def rectangle(label: str, left: int, top: int, right: int, bottom: int, **more: Any) -> dict[str, Any]:
    """An object with a mask in run lengths, in an image of 6 x 8 pixels."""
    mask = np.zeros((6, 8), bool)
    mask[top:bottom, left:right] = True
    runs = {"size": [6, 8], "counts": run_lengths(mask)}
    return {"label": label, "bbox": [left, top, right - left, bottom - top], "segmentation": runs, **more}


def sample_of(*objects: dict[str, Any], size: tuple[int, int] = (6, 8)) -> Sample:
    record = {"height": size[0], "width": size[1], "objects": list(objects)}
    pixels = np.zeros((6, 8, 3), np.uint8)
    return Sample("k", {"png": png(pixels), "boxes.json": json.dumps(record).encode()})


def test_larger_objects_lie_below_smaller_ones() -> None:
    small, large = rectangle("Cat", 1, 1, 3, 3), rectangle("sofa", 0, 0, 8, 4)
    for objects in ((small, large), (large, small)):
        found = LabelClasses(classes=CLASSES).label_map(sample_of(*objects), 6, 8)
        expected = np.full((6, 8), VOID)
        expected[:4] = 1
        expected[1:3, 1:3] = 0
        assert found.dtype == np.int16 and np.array_equal(found, expected)


def test_crowds_boxes_without_masks_and_other_classes_are_void() -> None:
    crowd, cat = rectangle("cat", 0, 0, 8, 6, iscrowd=1), rectangle("cat", 0, 0, 2, 2)
    bare, dog = {"label": "cat", "bbox": [3.5, 0, 2, 1]}, rectangle("dog", 0, 4, 8, 6)
    classes = LabelClasses(classes=CLASSES, unlabelled="Other")
    assert classes.label_map(sample_of(crowd, cat), 6, 8).tolist() == [[0] * 2 + [VOID] * 6] * 2 + [[VOID] * 8] * 4
    found = classes.label_map(sample_of(cat, bare, dog), 6, 8)
    expected = np.full((6, 8), 2)
    expected[:2, :2] = 0
    expected[0, 3:6] = expected[4:] = VOID
    assert np.array_equal(found, expected)


def test_another_key_has_the_class() -> None:
    """The class is the colour where the config says so; an object without a colour makes its sample unreadable."""
    star, disc = rectangle("star", 0, 0, 2, 2, colour="red"), rectangle("disc", 4, 0, 8, 2, colour="blue")
    colours = LabelClasses(classes=("blue", "red"), label_key="colour")
    assert colours.label_map(sample_of(star, disc), 6, 8)[0].tolist() == [1, 1, VOID, VOID, 0, 0, 0, 0]
    with pytest.raises(UnreadableSample, match="colour"):
        colours.label_map(sample_of(rectangle("star", 0, 0, 2, 2)), 6, 8)


def test_polygons_are_filled() -> None:
    triangle = {"label": "cat", "bbox": [0, 0, 8, 6], "segmentation": [[0, 0, 8, 0, 8, 6, 0, 6]]}
    assert (LabelClasses(classes=CLASSES).label_map(sample_of(triangle), 6, 8) == 0).all()


VALUES = np.array([[0, 1, 2, 3], [3, 2, 255, 255]])


@pytest.mark.parametrize(("kind", "mode"), [(np.uint8, None), (np.uint8, "P"), (np.uint16, None)])
def test_masks_of_eight_and_sixteen_bits(kind: type, mode: str | None) -> None:
    """Class 3 of the data, a dog, is none of the classes."""
    values = VALUES.astype(kind)
    if kind is np.uint16:
        values[1, 3] = 65535
    sample = Sample("k", {"mask.png": png(values, mode)})
    names = ("Sofa", "cat", "dog")
    void = LabelClasses(classes=CLASSES, field="mask.png", mask_classes=names)
    assert void.label_map(sample, 2, 4).tolist() == [[-1, 1, 0, -1], [-1, 0, -1, -1]]
    other = LabelClasses(classes=CLASSES, field="mask.png", mask_classes=names, unlabelled="other")
    assert other.label_map(sample, 2, 4).tolist() == [[2, 1, 0, -1], [-1, 0, -1, -1]]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "no mask.png"),
        ({"mask.png": b"\x89PNG"}, "mask.png"),
        ({"mask.png": png(np.zeros((2, 5), np.uint8))}, "5 x 2 pixels, its image 4 x 2"),
        ({"mask.png": png(np.zeros((2, 4, 3), np.uint8))}, "RGB, not grey"),
        ({"mask.png": png(np.full((2, 4), 9, np.uint8))}, "value 9, but there are 3"),
    ],
)
def test_masks_that_make_a_sample_unreadable(fields: dict[str, bytes], sentence: str) -> None:
    classes = LabelClasses(classes=CLASSES, field="mask.png", mask_classes=("a", "b", "c"))
    with pytest.raises(UnreadableSample, match=sentence):
        classes.label_map(Sample("k", fields), 2, 4)


def test_objects_that_do_not_fit() -> None:
    classes = LabelClasses(classes=CLASSES)
    with pytest.raises(DataError, match="measured in 9 x 6"):
        classes.label_map(sample_of(size=(6, 9)), 6, 8)
    with pytest.raises(UnreadableSample, match=r"no boxes\.json"):
        classes.label_map(Sample("k", {}), 6, 8)
    broken = {"label": "cat", "bbox": [0, 0, 2, 2], "segmentation": {"size": [1, 1], "counts": [1]}}
    with pytest.raises(UnreadableSample, match="polygons nor runs"):
        classes.label_map(sample_of(broken), 6, 8)


def test_settings() -> None:
    with pytest.raises(SettingError, match="unlabelled"):
        LabelClasses(classes=CLASSES, unlabelled="ground")
    with pytest.raises(SettingError, match="class_names"):
        LabelClasses(classes=())


@pytest.mark.parametrize("size", [(90, 120), (40, 40), (1, 1), (3, 400)])
def test_labels_move_as_pixels_do(size: tuple[int, int]) -> None:
    """A square is bright in the image where its class is in the label map, but for the pixels of its edge."""
    height, width = size
    resize = RandomResize(size=64, scale=(0.3, 2.0), flip=0.5)
    labels = np.zeros(size, np.int16)
    labels[height // 4 : height // 2 + 1, width // 8 : width // 3 + 1] = 1
    pixels = np.repeat(labels[:, :, None] * 255, 3, axis=2).astype(np.uint8)
    kinds = set()
    for number in range(25):
        place = resize.place(height, width, 3, SamplePosition(0, number))
        moved, seen = placed_labels(labels, place), place.image(pixels)[0].numpy()
        down, right = place.extent
        assert moved.shape == (64, 64) and (moved[down:] == VOID).all() and (moved[:, right:] == VOID).all()
        wrong = (seen[:down, :right] > 127) != (moved[:down, :right] == 1)
        edge = np.abs(seen[:down, :right].astype(int) - 127) < 126
        assert not (wrong & ~edge).any()
        kinds.add((place.mirrored, place.offset != (0, 0)))
    assert len(kinds) >= 2


def test_the_reader_gives_squares_or_what_is_stored() -> None:
    classes = LabelClasses(classes=CLASSES)
    sample = sample_of(rectangle("cat", 0, 0, 4, 6))
    reader = SegmentationReader(classes=classes, resize=RandomResize(size=32, scale=(0.5, 2.0)))
    assert reader.fields == ("image", "boxes.json")
    batch = reader.collate([reader.read(sample, SamplePosition(0, number)) for number in range(4)])
    assert batch["image"].shape == (4, 3, 32, 32) and batch["image"].dtype == torch.uint8
    assert batch["labels"].shape == (4, 32, 32) and batch["labels"].dtype == torch.int16
    whole = reader.read(sample)["labels"]
    assert whole[:24].tolist() == [[0] * 16 + [VOID] * 16] * 24 and (whole[24:] == VOID).all()
    stored = SegmentationReader(classes=classes, resize=None)
    rows = stored.collate([stored.read(sample)])
    assert rows["image"][0].shape == (3, 6, 8) and rows["labels"][0].shape == (6, 8)
