"""``boxes.json`` of grounding data, from the formats in which it is published.

A region is one or several boxes with one or several spans of the caption. Unusable boxes (not four finite numbers, no
area inside the image, a score that is not 0 to 1) and unusable spans (empty, outside of the caption) are left out and
counted; a region that keeps no box or no span is left out.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import SampleError
from pipeline.shards.objects import MOST_OBJECTS, inside, is_span, plain_word

Span = tuple[int, int]

_TYPES: Mapping[str, pa.DataType] = {
    "url": pa.string(),
    "stamp": pa.string(),
    "caption": pa.string(),
    "objects": pa.int64(),
    "left_out": pa.int64(),
    "boxes": pa.binary(),
    "problem": pa.string(),
}
SCHEMA = pa.schema(_TYPES)
BAD = (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError)
"""What reading a record of another shape raises."""
COLUMNS: Mapping[str, type] = {"objects": int, "left_out": int, "boxes_digest": str}


@dataclass(frozen=True)
class GroundedRegion:
    """Boxes x1, y1, x2, y2 in pixels, their scores (1 where there are none), spans of the caption, and the kinds of its
    phrase."""

    boxes: Sequence[Any]
    spans: Sequence[Any]
    scores: Sequence[float] = ()
    crowd: bool = False
    kinds: Sequence[str] = ()


@dataclass(frozen=True)
class GroundingRecord:
    """The content of ``boxes.json`` for one image, and how many boxes and regions were left out."""

    content: dict[str, Any]
    left_out: int = 0
    caption: str = ""

    def row(self, url: str, stamp: str = "") -> dict[str, Any]:
        """A row of :data:`SCHEMA`."""
        text = json.dumps(self.content, separators=(",", ":"), ensure_ascii=False)
        return {
            "url": url,
            "stamp": stamp,
            "caption": self.caption,
            "objects": len(self.content["objects"]),
            "left_out": self.left_out,
            "boxes": text.encode("utf-8", "replace"),
            "problem": "",
        }


def problem_row(url: str, error: Exception | str, stamp: str = "") -> dict[str, Any]:
    """The row of an annotation that cannot be used."""
    text = str(error) if isinstance(error, str) else f"{type(error).__name__}: {error}"
    plain = " ".join(f"not as described ({text})".split())[:300]
    nothing = {"caption": "", "objects": 0, "left_out": 0, "boxes": b""}
    return {"url": url, "stamp": stamp, **nothing, "problem": plain.encode("utf-8", "replace").decode()}


def caption_record(
    height: int, width: int, caption: str, regions: Iterable[GroundedRegion], teacher: str = ""
) -> GroundingRecord:
    """The record of a caption with regions; raises ``ValueError`` for an image without area or too many objects."""
    caption = caption.encode("utf-8", "replace").decode()  # a lone surrogate is one character before and after
    objects: list[dict[str, Any]] = []
    phrases: dict[Span, dict[str, Any]] = {}
    left_out = 0
    for region in regions:
        spans = [span for span in map(_span, region.spans) if span is not None and is_span(*span, caption)]
        boxes = [_box(box, height, width) if _has_score(region, n) else None for n, box in enumerate(region.boxes)]
        left_out += sum(box is None for box in boxes) + (not spans)
        for place, box in enumerate(boxes if spans else ()):
            if box is not None:
                for start, end in dict.fromkeys(spans):
                    phrase = phrases.setdefault((start, end), {"start": start, "end": end, "objects": []})
                    phrase["objects"].append(len(objects))
                    if region.kinds:
                        phrase["kind"] = list(dict.fromkeys([*phrase.get("kind", ()), *region.kinds]))
                start, end = spans[0]
                score = {"score": float(region.scores[place])} if place < len(region.scores) else {}
                crowd = {"iscrowd": 1} if region.crowd else {}
                objects.append({"id": len(objects), "label": caption[start:end], "bbox": box, **score, **crowd})
    named = {"caption": caption, "phrases": [phrases[span] for span in sorted(phrases)], "open": True}
    more = {"teacher": teacher} if teacher else {}
    return GroundingRecord({**_sized(height, width, objects), **named, **more}, left_out, caption)


def class_record(height: int, width: int, instances: Iterable[tuple[str, Any, Mapping[str, Any]]]) -> GroundingRecord:
    """The record of boxes with class names: name, box and further keys of each object; raises ``ValueError``."""
    found = [(name, _box(box, height, width), more) for name, box, more in instances]
    found = [(name, box if _is_score(more.get("score", 1.0)) else None, more) for name, box, more in found]
    kept = [{"label": name, "bbox": box, **more} for name, box, more in found if box is not None and is_name(name)]
    return GroundingRecord(_sized(height, width, kept), len(found) - len(kept))


def is_name(label: str) -> bool:
    """Whether a class name has a character that is not white space, a full stop or invisible."""
    return any(character.isprintable() and not character.isspace() for character in plain_word(label))


def listed_classes(labels: Iterable[str]) -> dict[str, str]:
    """The classes of ``labels``, sorted, each with an empty group; of equal names (``plain_word``) the first one."""
    names: dict[str, str] = {}
    for label in sorted(set(labels)):
        if is_name(label):
            names.setdefault(plain_word(label), label)
    return dict.fromkeys(names.values(), "")


def _sized(height: int, width: int, objects: list[dict[str, Any]]) -> dict[str, Any]:
    if height <= 0 or width <= 0:
        raise ValueError(f"an image of {width} x {height} pixels")
    if len(objects) > MOST_OBJECTS:
        raise ValueError(f"more than {MOST_OBJECTS} objects")
    return {"width": width, "height": height, "objects": objects}


def _span(span: Any) -> Span | None:
    try:
        start, end = span
        return int(start), int(end)
    except (TypeError, ValueError, OverflowError):
        return None


def _has_score(region: GroundedRegion, place: int) -> bool:
    return place >= len(region.scores) or _is_score(region.scores[place])


def _is_score(value: Any) -> bool:
    try:
        return 0 <= float(value) <= 1
    except (TypeError, ValueError):
        return False


def _box(box: Any, height: int, width: int) -> list[float] | None:
    """x, y, width, height of the part of x1, y1, x2, y2 inside the image; ``None`` where it is unusable."""
    try:
        corners = np.array([float(value) for value in box], np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    cut = inside(corners, height, width) if corners.shape == (4,) else None
    return None if cut is None else [*cut[:2].tolist(), *(cut[2:] - cut[:2]).tolist()]


@dataclass(frozen=True)
class FoundFiles:
    """The images below a folder: relative paths with version stamps, and the paths whose file name occurs once."""

    stamps: Mapping[str, str]
    by_name: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, stamps: Mapping[str, str]) -> "FoundFiles":
        """Index the paths by file name."""
        names: dict[str, list[str]] = {}
        for path in stamps:
            names.setdefault(path.rpartition("/")[2], []).append(path)
        return cls(stamps, {name: paths[0] for name, paths in names.items() if len(paths) == 1})

    def find(self, name: str) -> str | None:
        """The path of an image that an annotation names by its path, or by its file name if that occurs once."""
        slashed = name.replace("\\", "/").removeprefix("./")
        return slashed if slashed in self.stamps else self.by_name.get(slashed.rpartition("/")[2])


def problem_of(values: Mapping[str, Any]) -> SampleError | None:
    """The problem of a row of :data:`SCHEMA`."""
    return SampleError("failed_to_resize", "bad_annotation", values["problem"]) if values["problem"] else None
