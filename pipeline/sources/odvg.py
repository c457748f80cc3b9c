"""ODVG: one JSON object per line, as MMDetection and Open-GroundingDINO read object detection and visual grounding.

    {"filename": "a.jpg", "height": 480, "width": 640,
     "detection": {"instances": [{"bbox": [x1, y1, x2, y2], "label": 0, "category": "person"}]}}
    {"filename": "b.jpg", "height": 480, "width": 640,
     "grounding": {"caption": "a cat on a mat",
                   "regions": [{"bbox": [x1, y1, x2, y2] or a list of these, "phrase": "a cat" or a list,
                                "tokens_positive": [[0, 5]], "score": 0.8}]}}

    jobs/refresh_dataset.py odvg --annotations flickr_od.jsonl --images flickr30k --output-folder flickr

``tokens_positive`` are code points of the caption. Without them a phrase is looked up in the caption: its first
occurrence as whole words. A file of boxes may come with a label map, ``{"0": "person"}``. ``score`` is an addition of
ours.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from pipeline.config import parse_json, require
from pipeline.errors import ReadError, unreadable
from pipeline.shards.storage import file_system, read_errors
from pipeline.sources.annotated_files import AnnotatedFiles
from pipeline.sources.grounding_records import (
    BAD,
    GroundedRegion,
    GroundingRecord,
    Span,
    caption_record,
    class_record,
    listed_classes,
)


@dataclass(frozen=True, kw_only=True)
class Odvg(AnnotatedFiles):
    """The images of a file, in its order."""

    kind: ClassVar[str] = "odvg"
    summary: ClassVar[str] = "ODVG's annotations (jsonl) of boxes or captions with phrases, and a folder of images."

    label_map: str = ""
    """Label map of a file of boxes, {"0": "person"}, as a path or fsspec URI; empty = each box has its category."""

    @cached_property
    def classes(self) -> Mapping[str, str]:
        """The names of the label map, or the categories of the file, each with an empty group."""
        if self.label_map:
            return dict.fromkeys(self._labels.values(), "")
        return listed_classes(name for _, line in self._lines() for name in _categories(line))

    def records(self) -> Iterator[tuple[str, GroundingRecord | Exception]]:
        """See :class:`~pipeline.sources.annotated_files.AnnotatedFiles`; a line that is no record is an exception."""
        count = 0
        for count, line in self._lines():
            try:
                plain = parse_json(line)
                name = str(plain["filename"])
            except BAD as error:
                yield f"{self.annotations}:{count}", error
                continue
            try:
                yield name, record_of_line(plain, self._labels)
            except BAD as error:
                yield name, error
        require(count > 0, "annotations", self.annotations, "a file with at least one line")

    @cached_property
    def _labels(self) -> Mapping[int, str]:
        if not self.label_map:
            return {}
        allowed = 'a label map, {"0": "person", ...}'
        fs, path = file_system(self.label_map)
        try:
            with read_errors(self.label_map), fs.open(path, "rb") as file:
                return {int(number): str(name) for number, name in parse_json(file.read()).items()}
        except ReadError:
            raise
        except (OSError, *BAD) as error:
            raise unreadable("label_map", self.label_map, allowed, error) from error

    def _lines(self) -> Iterator[tuple[int, str]]:
        """The lines that are not empty, with their numbers from 1 on."""
        fs, path = file_system(self.annotations)
        try:
            with (
                read_errors(self.annotations),
                fs.open(path, "rt", encoding="utf-8-sig", errors="replace", compression="infer") as file,
            ):
                yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        except ReadError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable("annotations", self.annotations, "ODVG's lines of JSON", error) from error


def record_of_line(plain: Mapping[str, Any], labels: Mapping[int, str]) -> GroundingRecord:
    """The record of a parsed line; raises ``ValueError``, ``KeyError`` or ``TypeError`` for another object."""
    height, width = int(plain["height"]), int(plain["width"])
    if "grounding" in plain:
        grounding = plain["grounding"]
        caption = str(grounding["caption"])
        regions = [_region(one, caption) for one in grounding.get("regions") or ()]
        return caption_record(height, width, caption, regions, str(plain.get("teacher") or ""))
    instances = [(_name(one, labels), one["bbox"], _more(one)) for one in plain["detection"].get("instances") or ()]
    return class_record(height, width, instances)


def _region(region: Mapping[str, Any], caption: str) -> GroundedRegion:
    boxes = region["bbox"]
    boxes = boxes if boxes and isinstance(boxes[0], list) else [boxes]
    scores = region.get("score")
    scores = () if scores is None else scores if isinstance(scores, list) else [scores] * len(boxes)
    spans = region.get("tokens_positive")
    if spans is None:
        phrases = region["phrase"]
        spans = _occurrences([phrases] if isinstance(phrases, str) else phrases, caption)
    elif spans and not isinstance(spans[0], list):
        spans = [spans]
    return GroundedRegion(boxes, spans, scores)


def _occurrences(phrases: Sequence[str], caption: str) -> list[Span]:
    """The first occurrence of each phrase as whole words; none where it does not occur."""
    found = [re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", caption) for phrase in phrases if phrase.strip()]
    return [one.span() for one in found if one is not None]


def _name(instance: Mapping[str, Any], labels: Mapping[int, str]) -> str:
    return labels[int(instance["label"])] if labels else str(instance["category"])


def _more(instance: Mapping[str, Any]) -> dict[str, Any]:
    return {"score": instance["score"]} if "score" in instance else {}


def _categories(line: str) -> set[str]:
    try:
        return {str(one["category"]) for one in json.loads(line).get("detection", {}).get("instances") or ()}
    except (*BAD, RecursionError):
        return set()
