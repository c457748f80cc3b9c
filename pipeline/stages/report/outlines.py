"""Boxes and masks of a sample as outlines to draw, in fractions of the image, so that any display size works.

Read from ``boxes.json`` (COCO's ``bbox`` and uncompressed run-length ``segmentation`` per entry of ``objects``) and
from ``mask.png`` (one grey value per object or class, 0 is background), and from rows of pseudo boxes. The first two
are untrusted: entries that do not fit the image are left out.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SampleError
from pipeline.shards.pixels import read_header
from pipeline.shards.sample import Sample
from pipeline.shards.segmentation import mask_of_runs
from pipeline.stages.annotate.pseudo_boxes import COLUMNS, objects_of_row

BOXES, MASK = "boxes.json", "mask.png"
MOST_REGIONS = 50
MOST_POINTS = 400
MOST_PIXELS = 4096 * 4096
MOST_BYTES = 4 * 2**20
LONGEST_LABEL = 60


@dataclass(frozen=True, kw_only=True)
class Region:
    """``box`` is x, y, width, height; an ``outline`` is x, y, x, y, … of a polygon; all as fractions, 0 to 1."""

    label: str
    box: tuple[float, float, float, float] | None = None
    outlines: tuple[tuple[float, ...], ...] = ()


def read_regions(sample: Sample, width: int, height: int) -> tuple[Region, ...]:
    """The annotated regions of a sample's image of ``width`` by ``height`` pixels, and its pseudo boxes with scores."""
    described = _described(sample.fields.get(BOXES, b""), width, height) + _predicted(sample)
    return described[:MOST_REGIONS] or _masked(sample.fields.get(MASK, b""))


def _predicted(sample: Sample) -> tuple[Region, ...]:
    """The pseudo boxes in the sample's rows of sidecars."""
    found = []
    for row in sample.rows.values():
        objects = objects_of_row(row) if set(COLUMNS) <= row.keys() else None
        for number, label in enumerate(() if objects is None else objects.labels):
            assert objects is not None
            x1, y1, x2, y2 = objects.boxes[number].tolist()
            box = _box([x1, y1, x2 - x1, y2 - y1], objects.width, objects.height)
            name = f"{label[:LONGEST_LABEL]} {objects.scores[number]:.2f}"
            found += [Region(label=name, box=box)] if box else []
    return tuple(found)


def _described(content: bytes, width: int, height: int) -> tuple[Region, ...]:
    try:
        record = json.loads(content[: MOST_BYTES + 1] if len(content) <= MOST_BYTES else b"")
        objects = list(record["objects"])[:MOST_REGIONS]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()
    regions = (_region(obj, width, height) for obj in objects if isinstance(obj, dict))
    return tuple(region for region in regions if region)


def _region(obj: Mapping[str, Any], width: int, height: int) -> Region | None:
    label = str(obj.get("label") or obj.get("category") or "")[:LONGEST_LABEL]
    box = _box(obj.get("bbox"), width, height)
    outlines = _outlines_of_runs(obj.get("segmentation"))
    return Region(label=label, box=box, outlines=outlines) if box or outlines else None


def _box(values: object, width: int, height: int) -> tuple[float, float, float, float] | None:
    if not isinstance(values, list) or len(values) != 4:
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return None
    left, right = (min(max(value / width, 0.0), 1.0) for value in (values[0], values[0] + values[2]))
    top, bottom = (min(max(value / height, 0.0), 1.0) for value in (values[1], values[1] + values[3]))
    if right <= left or bottom <= top:
        return None
    return round(left, 4), round(top, 4), round(right - left, 4), round(bottom - top, 4)


def _outlines_of_runs(segmentation: object) -> tuple[tuple[float, ...], ...]:
    """Outlines of COCO's uncompressed run-length encoding: alternating runs of 0 and 1, column by column."""
    if not isinstance(segmentation, dict):
        return ()
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or not isinstance(counts, list) or len(size) != 2:
        return ()
    if not all(isinstance(number, int) and 0 <= number <= MOST_PIXELS for number in (*size, *counts)):
        return ()
    height, width = size
    if not 0 < height * width <= MOST_PIXELS or sum(counts) != height * width:
        return ()
    return _outlines(mask_of_runs(counts, height, width))


def _masked(content: bytes) -> tuple[Region, ...]:
    """One region per grey value of a mask; palette images are read as palette indices."""
    if not content or len(content) > MOST_BYTES:
        return ()
    try:
        header = read_header(content)
    except SampleError:
        return ()
    if header.width * header.height > MOST_PIXELS:
        return ()
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    if values is None:
        return ()
    numbers = [int(number) for number in np.unique(values) if number][:MOST_REGIONS]
    regions = (Region(label=str(number), outlines=_outlines((values == number).astype(np.uint8))) for number in numbers)
    return tuple(region for region in regions if region.outlines)


def _outlines(mask: NDArray[np.uint8]) -> tuple[tuple[float, ...], ...]:
    """The largest outer contours of a mask, uint8 [height, width] of 0 and 1, simplified to few points."""
    height, width = mask.shape
    found, _ = cv2.findContours(np.ascontiguousarray(mask), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outlines = []
    for contour in sorted(found, key=lambda one: -cv2.contourArea(one))[:8]:
        points = cv2.approxPolyDP(contour, 0.004 * max(height, width), True).reshape(-1, 2)[:MOST_POINTS]
        if len(points) >= 3:
            middles = (points + 0.5) / (width, height)
            outlines.append(tuple(round(float(value), 4) for value in middles.ravel()))
    return tuple(outlines)
