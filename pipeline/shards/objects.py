"""What is known of the things in an image: the member ``boxes.json``, COCO's conventions per sample.

    {"width": 640, "height": 480,                        pixels of the image that boxes and masks are measured in
     "objects": [{"label": "cat", "bbox": [x, y, width, height],
                  "segmentation": polygons, or {"size": [height, width], "counts": runs or COCO's string},
                  "iscrowd": 0, "area": 812.5, "id": 17}],
     "negative": ["dog"],                                labels known not to be there (LVIS); where the list exists, if
                                                         only an empty one, nobody looked for labels that are nowhere
     "incomplete": ["cat"]}                              labels of which only some are marked (LVIS)

Everything but ``width``, ``height``, ``objects``, ``label`` and ``bbox`` may be missing. Whoever wrote the file is not
trusted: boxes are cut to the image, and those that then have no area, or were no numbers, are left out and counted.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.shards.sample import Sample

FIELD = "boxes.json"
MOST_OBJECTS = 10_000
SMALLEST = 1e-3
"""Pixels: a box with a shorter side has no area."""


@dataclass(frozen=True)
class Objects:
    """The things in one image of ``height`` x ``width`` pixels; the lists belong together.

    ``boxes`` are x1, y1, x2, y2 in pixels, float64 [N, 4], inside the image; ``left_out`` counts unusable ones.
    ``areas``, float64 [N], are what COCO sorts small and large by: the visible pixels where they are stated, else the
    box's. A segmentation is None also where it is an empty list, as tools write that know boxes only. ``federated``:
    only the labels of ``negative`` and of the objects were looked for (LVIS). ``key`` is that of their sample.
    """

    height: int
    width: int
    boxes: NDArray[np.float64]
    labels: tuple[str, ...]
    segmentations: tuple[Any, ...] = ()
    crowd: tuple[bool, ...] = ()
    negative: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    left_out: int = 0
    areas: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    federated: bool = False
    key: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def check_size(self, height: int, width: int, key: str) -> None:
        """Raise ``DataError`` unless the image of sample ``key`` has the size that the boxes are measured in."""
        if (height, width) != (self.height, self.width):
            sizes = f"{width} x {height} pixels, its boxes are measured in {self.width} x {self.height}"
            raise DataError(f"the image of sample {key} has {sizes}: refresh with --resize-mode no")


def plain_word(word: str) -> str:
    """``hot dog`` of ``Hot_Dog; frankfurter``: names and labels that become the same are the same class."""
    return " ".join(names_of(word)[0].replace("_", " ").lower().split()).rstrip(".")


def names_of(word: str) -> tuple[str, ...]:
    """``couch`` and ``sofa`` of ``couch; sofa``: a class is known by its first name, and described by all of them."""
    return tuple(name.strip() for name in word.split(";"))


def word_of(names: Iterable[str]) -> str:
    """``couch; sofa`` of these names, each once, empty ones left out."""
    kept: dict[str, str] = {}
    for name in names:
        kept.setdefault(plain_word(name), name)
    return "; ".join(name for plain, name in kept.items() if plain)


def read_objects(sample: Sample) -> Objects:
    """The objects of ``sample``.

    Raises:
        DataError: no ``boxes.json``, or one that is none; the key is named.
    """
    content = sample.fields.get(FIELD)
    if content is None:
        raise DataError(f"sample {sample.key} has no {FIELD}: these data have no boxes")
    try:
        record = json.loads(content)
        height, width = int(record["height"]), int(record["width"])
        things = record["objects"]
        if not (height > 0 and width > 0 and isinstance(things, list) and len(things) <= MOST_OBJECTS):
            raise ValueError(f"{width} x {height} pixels, {type(things).__name__} of objects")
        return replace(_objects(things, record, height, width), key=sample.key)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{FIELD} of sample {sample.key} is not as described ({error!r})") from error


def _objects(things: Sequence[Mapping[str, Any]], record: Mapping[str, Any], height: int, width: int) -> Objects:
    boxes = [inside(corners(thing["bbox"]), height, width) for thing in things]
    kept = [(box, thing) for box, thing in zip(boxes, things, strict=True) if box is not None]
    return Objects(
        height=height,
        width=width,
        boxes=np.array([box for box, _ in kept], np.float64).reshape(-1, 4),
        labels=tuple(str(thing["label"]) for _, thing in kept),
        segmentations=tuple(thing.get("segmentation") or None for _, thing in kept),
        crowd=tuple(bool(thing.get("iscrowd", 0)) for _, thing in kept),
        negative=tuple(str(label) for label in record.get("negative", ())),
        incomplete=tuple(str(label) for label in record.get("incomplete", ())),
        left_out=len(things) - len(kept),
        areas=np.array([_area(thing, box) for box, thing in kept], np.float64),
        federated="negative" in record,
    )


def _area(thing: Mapping[str, Any], box: NDArray[np.float64]) -> float:
    stated = float(thing.get("area") or 0.0)
    return stated if 0 < stated < np.inf else float((box[2:] - box[:2]).prod())


def corners(bbox: Sequence[float]) -> NDArray[np.float64]:
    """COCO's x, y, width, height to x1, y1, x2, y2."""
    x, y, width, height = (float(value) for value in bbox)
    return np.array([x, y, x + width, y + height])


def inside(box: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64] | None:
    """The part of a box (x1, y1, x2, y2) that is in the image; ``None`` where there is none, or no number."""
    if not np.isfinite(box).all():
        return None
    cut: NDArray[np.float64] = np.clip(box, 0, [width, height, width, height])
    return cut if (cut[2:] - cut[:2] > SMALLEST).all() else None


def overlaps(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of boxes x1, y1, x2, y2: [N, 4] and [M, 4] to [N, M]."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    areas = (first[:, 2:] - first[:, :2]).prod(axis=1)[:, None] + (second[:, 2:] - second[:, :2]).prod(axis=1)[None]
    overlap: NDArray[np.float64] = shared / np.maximum(areas - shared, 1e-12)
    return overlap
