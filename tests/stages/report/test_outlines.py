"""Boxes and masks as outlines, compared with hand-drawn masks; invalid entries are left out."""

import json

import cv2
import numpy as np
import pytest

from pipeline.shards.sample import Sample
from pipeline.shards.segmentation import mask_of, run_lengths
from pipeline.sources.drawn.sample import draw_sample
from pipeline.stages.report.outlines import MOST_REGIONS, read_regions


def sample(objects: object = None, **fields: bytes) -> Sample:
    described = {"boxes.json": json.dumps({"objects": objects}).encode()} if objects is not None else {}
    return Sample("key", {**described, **{name.replace("_", "."): value for name, value in fields.items()}})


def area(outline: tuple[float, ...], width: int, height: int) -> np.ndarray:
    """The polygon filled again, as a mask."""
    points = np.array(outline).reshape(-1, 2) * (width, height) - 0.5
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1)
    return canvas.astype(bool)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_boxes_are_fractions_cut_at_the_edge() -> None:
    (inside, over) = read_regions(
        sample([{"label": "cat", "bbox": [10, 20, 30, 40]}, {"category": "dog", "bbox": [90, -10, 1e9, 20]}]), 100, 200
    )
    assert inside.label == "cat" and inside.box == (0.1, 0.1, 0.3, 0.2)
    assert over.label == "dog" and over.box == (0.9, 0.0, 0.1, 0.05)


def test_run_lengths_become_the_outline_they_say() -> None:
    mask = np.zeros((40, 60), np.uint8)
    cv2.ellipse(mask, (30, 18), (20, 9), 25, 0, 360, 1, -1)
    runs = run_lengths(mask.astype(bool))
    (region,) = read_regions(sample([{"label": "x", "segmentation": {"size": [40, 60], "counts": runs}}]), 60, 40)
    assert overlap(area(region.outlines[0], 60, 40), mask.astype(bool)) > 0.9


def test_drawn_samples_are_understood() -> None:
    drawn = draw_sample("train", 0, 3, 128)
    record = drawn.record
    regions = read_regions(sample(record["objects"]), 128, 128)
    assert len(regions) == len(record["objects"]) and all(region.outlines for region in regions)
    largest = max(range(len(regions)), key=lambda place: record["objects"][place]["area"])
    segmentation = record["objects"][largest]["segmentation"]
    truth = mask_of(segmentation, *segmentation["size"])
    filled = np.any([area(outline, 128, 128) for outline in regions[largest].outlines], axis=0)
    assert overlap(filled, truth) > 0.8


def test_masks_by_grey_value() -> None:
    values = np.zeros((50, 80), np.uint8)
    values[5:25, 10:40], values[30:45, 50:75] = 7, 200
    regions = read_regions(sample(mask_png=cv2.imencode(".png", values)[1].tobytes()), 80, 50)
    assert [region.label for region in regions] == ["7", "200"]
    assert overlap(area(regions[0].outlines[0], 80, 50), values == 7) > 0.95


@pytest.mark.parametrize(
    "objects",
    [
        [{"bbox": "x"}],
        [{"bbox": [1, 2, 3]}],
        [{"bbox": [float("nan"), 0, 1, 1]}],
        [{"bbox": [5, 5, -2, 3]}],
        [{"bbox": [500, 5, 2, 3]}],
        [{"segmentation": {"size": [1e9, 1e9], "counts": [1]}}],
        [{"segmentation": {"size": [4, 4], "counts": [-1, 17]}}],
        [{"segmentation": {"size": [4, 4], "counts": [3, 3]}}],
        [{"segmentation": {"size": ["a", 4], "counts": [[1], 3]}}],
        [{"segmentation": {"size": [4, 4], "counts": [2**70]}}],
        ["text"],
        "text",
        7,
        [None],
    ],
)
def test_what_does_not_fit_is_left_out(objects: object) -> None:
    assert read_regions(sample(objects), 100, 100) == ()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"objects": 1}'])
def test_broken_json_is_left_out(content: bytes) -> None:
    assert read_regions(Sample("key", {"boxes.json": content}), 10, 10) == ()


def test_broken_masks_and_too_many_things() -> None:
    assert read_regions(sample(mask_png=b"\x89PNG nothing"), 10, 10) == ()
    many = [{"bbox": [0, 0, 5, 5]}] * 1000
    assert len(read_regions(sample(many), 10, 10)) == MOST_REGIONS
