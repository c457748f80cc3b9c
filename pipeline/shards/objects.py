"""Annotations of the objects in an image: the member ``boxes.json``, in COCO's conventions.

    {"width": 640, "height": 480,                        size of the image in pixels
     "objects": [{"label": "cat", "bbox": [x, y, width, height],
                  "segmentation": polygons, or {"size": [height, width], "counts": runs or COCO's string},
                  "iscrowd": 0, "area": 812.5, "id": 17}],
     "negative": ["dog"],                                labels verified absent (LVIS); if the list exists, even empty,
                                                         labels not mentioned anywhere were not verified
     "incomplete": ["cat"],                              labels with unannotated instances (LVIS)
     "caption": "a cat on a mat", "open": true,          labels are phrases, not classes of a list
     "phrases": [{"start": 2, "end": 5, "objects": [17], code points of the caption; ids of objects
                  "kind": "animals"}],                       one kind of phrase, or a list of them
     "more_captions": [{"caption": ..., "phrases": [...]}]}   further captions of the image

All keys but ``width``, ``height``, ``objects``, ``label`` and ``bbox`` are optional. An object without ``id`` has its
number in the list as its id; predicted objects have a ``score``, and ``teacher`` names the model. The file is not
trusted: boxes are clipped to the image; boxes without area or with values that are not numbers, and phrases that are
empty or outside of the caption, are left out and counted.
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
"""Maximum number of objects of an image, and of phrases of its caption."""
SMALLEST = 1e-3
"""Shortest side of a box in pixels; below it the box has no area."""


@dataclass(frozen=True)
class GroundedPhrase:
    """``caption[start:end]`` in Unicode code points, and the numbers of its objects in the lists of
    :class:`Objects`; none where the objects are not annotated. ``kinds`` are types such as people or clothing."""

    start: int
    end: int
    objects: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroundedCaption:
    """A text about an image, and its parts that name objects."""

    text: str
    phrases: tuple[GroundedPhrase, ...] = ()


@dataclass(frozen=True)
class Objects:
    """The objects in one image of ``height`` x ``width`` pixels, as parallel lists.

    - ``boxes``: x1, y1, x2, y2 in pixels, float64 [N, 4], inside the image; ``left_out`` counts unusable boxes.
    - ``areas``: float64 [N], for COCO's size ranges: the stated area in pixels, else the area of the box.
    - ``segmentations``: None also for an empty one (``[]``, ``[[]]``), as written by tools without masks.
    - ``federated``: only the labels in ``negative`` and of the objects were verified (LVIS).
    - ``caption``, ``phrases``: a text about the image, and its parts that name objects; ``phrases_left_out`` counts
      unusable ones.
    - ``more_captions``: further captions of the image, with phrases that name the same objects or others.
    - ``open_labels``: labels are phrases of a caption; objects that no caption mentions were not annotated.
    - ``scores``: float64 [N], 0 to 1; 1 where an object was not predicted by ``teacher``.
    - ``key``: key of the sample.
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
    caption: str = ""
    phrases: tuple[GroundedPhrase, ...] = ()
    phrases_left_out: int = 0
    more_captions: tuple[GroundedCaption, ...] = ()
    open_labels: bool = False
    scores: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    teacher: str = ""
    key: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def captions(self) -> tuple[GroundedCaption, ...]:
        """All captions; an empty one where there is none."""
        return (GroundedCaption(self.caption, self.phrases), *self.more_captions)

    def with_caption(self, number: int) -> "Objects":
        """The same objects with caption ``number`` of :attr:`captions` alone."""
        one = self.captions[number]
        return replace(self, caption=one.text, phrases=one.phrases, more_captions=())

    def check_size(self, height: int, width: int, key: str) -> None:
        """Raise ``DataError`` unless the image of sample ``key`` has the size for which the boxes were made."""
        if (height, width) != (self.height, self.width):
            sizes = f"{width} x {height} pixels, its boxes are measured in {self.width} x {self.height}"
            raise DataError(f"the image of sample {key} has {sizes}: refresh with --resize-mode no")


def plain_word(word: str) -> str:
    """Normalised first name, ``hot dog`` of ``Hot_Dog; frankfurter``; equal results mean the same class."""
    return " ".join(names_of(word)[0].replace("_", " ").lower().split()).rstrip(".")


def names_of(word: str) -> tuple[str, ...]:
    """All names, ``couch`` and ``sofa`` of ``couch; sofa``: the first identifies the class, the others are synonyms."""
    return tuple(name.strip() for name in word.split(";"))


def word_of(names: Iterable[str]) -> str:
    """Join names to ``couch; sofa``, without repeated and empty ones."""
    kept: dict[str, str] = {}
    for name in names:
        kept.setdefault(plain_word(name), name)
    return "; ".join(name for plain, name in kept.items() if plain)


def read_objects(sample: Sample, label_key: str = "label") -> Objects:
    """The objects of ``sample``; ``label_key`` is the key of an object that has its label.

    Raises:
        DataError: ``boxes.json`` is missing or malformed; the message names the key.
    """
    content = sample.fields.get(FIELD)
    if content is None:
        raise DataError(f"sample {sample.key} has no {FIELD}: this dataset has no boxes")
    try:
        record = json.loads(content)
        height, width = int(record["height"]), int(record["width"])
        objects = record["objects"]
        if not (height > 0 and width > 0 and isinstance(objects, list) and len(objects) <= MOST_OBJECTS):
            raise ValueError(f"{width} x {height} pixels, {type(objects).__name__} of objects")
        return replace(_objects(objects, record, height, width, label_key), key=sample.key)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{FIELD} of sample {sample.key} is not as described ({error!r})") from error


def _objects(
    objects: Sequence[Mapping[str, Any]], record: Mapping[str, Any], height: int, width: int, label_key: str
) -> Objects:
    boxes = [inside(corners(obj["bbox"]), height, width) for obj in objects]
    kept = [(box, obj) for box, obj in zip(boxes, objects, strict=True) if box is not None]
    ids = [obj.get("id", number) for number, obj in enumerate(objects)]
    known = [one for one, box in zip(ids, boxes, strict=True) if box is not None]
    (first, *more), phrases_left_out = _captions(record, known)
    return Objects(
        height=height,
        width=width,
        boxes=np.array([box for box, _ in kept], np.float64).reshape(-1, 4),
        labels=tuple(str(obj[label_key]) for _, obj in kept),
        segmentations=tuple(_segmentation(obj) for _, obj in kept),
        crowd=tuple(is_crowd(obj.get("iscrowd", 0)) for _, obj in kept),
        negative=tuple(str(label) for label in record.get("negative", ())),
        incomplete=tuple(str(label) for label in record.get("incomplete", ())),
        left_out=len(objects) - len(kept),
        areas=np.array([_area(obj, box) for box, obj in kept], np.float64),
        federated="negative" in record,
        caption=first.text,
        phrases=first.phrases,
        phrases_left_out=phrases_left_out,
        more_captions=tuple(more),
        open_labels=bool(record.get("open", False)),
        scores=np.array([_score(obj) for _, obj in kept], np.float64),
        teacher=str(record.get("teacher") or ""),
    )


def _captions(record: Mapping[str, Any], ids: Sequence[Any]) -> tuple[list[GroundedCaption], int]:
    """The captions, one or more, with their usable phrases, and the number of the other phrases."""
    further = record.get("more_captions") or ()
    if not isinstance(further, list | tuple) or len(further) > MOST_OBJECTS:
        raise ValueError(f"more_captions that are not a list of at most {MOST_OBJECTS}")
    found, left_out = [], 0
    for one in (record, *further):
        text = str(one.get("caption") or "")
        phrases, others = _phrases(one, text, ids)
        found.append(GroundedCaption(text, phrases))
        left_out += others
    return found, left_out


def _phrases(record: Mapping[str, Any], caption: str, ids: Sequence[Any]) -> tuple[tuple[GroundedPhrase, ...], int]:
    """The usable phrases, and the number of the others; ``ids`` are those of the kept objects."""
    listed = record.get("phrases") or ()
    if not isinstance(listed, list | tuple) or len(listed) > MOST_OBJECTS:
        raise ValueError(f"phrases that are not a list of at most {MOST_OBJECTS}")
    places = {one: number for number, one in reversed(list(enumerate(ids)))}
    found = [
        GroundedPhrase(
            int(one["start"]),
            int(one["end"]),
            tuple(places[number] for number in one.get("objects", ()) if number in places),
            _kinds(one.get("kind")),
        )
        for one in listed
    ]
    kept = tuple(one for one in found if is_span(one.start, one.end, caption))
    return kept, len(found) - len(kept)


def _kinds(value: object) -> tuple[str, ...]:
    """The kinds of a phrase: none, one name or a list of names."""
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(dict.fromkeys(str(name).strip() for name in names if str(name).strip()))


def is_span(start: int, end: int, text: str) -> bool:
    """Whether ``text[start:end]`` is a part of ``text`` that is not only white space."""
    return 0 <= start < end <= len(text) and bool(text[start:end].strip())


def _score(obj: Mapping[str, Any]) -> float:
    score = float(obj.get("score", 1.0))
    if not 0 <= score <= 1:
        raise ValueError(f"a score of {score}")
    return score


def _segmentation(obj: Mapping[str, Any]) -> Any:
    found = obj.get("segmentation")
    return None if not found or (isinstance(found, list) and not any(found)) else found


def is_crowd(value: object) -> bool:
    """The value of ``iscrowd``, also where a tool wrote it as text: ``"0"`` and ``"false"`` are no crowds."""
    return str(value).strip().lower() not in ("", "0", "0.0", "false", "no", "none", "null")


def _area(obj: Mapping[str, Any], box: NDArray[np.float64]) -> float:
    stated = float(obj.get("area") or 0.0)
    return stated if 0 < stated < np.inf else float((box[2:] - box[:2]).prod())


def corners(bbox: Sequence[float]) -> NDArray[np.float64]:
    """COCO's x, y, width, height to x1, y1, x2, y2."""
    x, y, width, height = (float(value) for value in bbox)
    return np.array([x, y, x + width, y + height])


def inside(box: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64] | None:
    """The box (x1, y1, x2, y2) clipped to the image; ``None`` where it has no area or a value that is not finite."""
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
