"""The tables of GLIP's code: images in base64, and their labels as JSON.

    images.tsv   KEY <tab> base64 of the encoded image
    images.lineidx   the byte at which each line of it begins, one number per line; made here if there is none
    labels.tsv   KEY <tab> JSON, line by line for the same keys

    jobs/refresh_dataset.py glip-tsv --images images.tsv --labels labels.tsv --output-folder cc3m-glip

A label is a list of boxes, ``[{"class": "person", "rect": [x1, y1, x2, y2]}]``, also below ``objects``, or a caption
with phrases: ``{"caption", "tokens_positive", "bboxes", "scores"}`` with one box for each span (version 1) or a list of
boxes for each (version 2).
"""

import base64
import binascii
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any, ClassVar

from PIL import Image

from pipeline.config import parse_json, require
from pipeline.errors import SampleError, unreadable
from pipeline.shards.objects import FIELD
from pipeline.shards.storage import Folder, file_system, read_errors
from pipeline.sources.annotation_table import table_rows, table_slices
from pipeline.sources.grounding_records import (
    BAD,
    COLUMNS,
    SCHEMA,
    GroundedRegion,
    GroundingRecord,
    caption_record,
    class_record,
)
from pipeline.sources.source import UNCHANGED, Part, Row, Scalar, Slice

LONGEST_LINE = 256 << 20
"""Bytes of a line; a longer one is no image of a training set."""


@dataclass(frozen=True, kw_only=True)
class GlipTsv:
    """The lines of both tables, in their order."""

    kind: ClassVar[str] = "glip-tsv"
    summary: ClassVar[str] = "GLIP's tables (tsv) of images in base64 and of boxes or captions with phrases."
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    has_captions: ClassVar[bool] = True

    images: str
    """Table of the images, as a path or fsspec URI that every worker can read; its .lineidx is used where it exists."""
    labels: str
    """Table of the labels, with the same keys in the same order, as a path or fsspec URI."""

    def __post_init__(self) -> None:
        require(bool(self.images), "images", self.images, "a table of images (.tsv)")
        require(bool(self.labels), "labels", self.labels, "a table of labels (.tsv)")

    @cached_property
    def classes(self) -> Mapping[str, str]:
        """The class names of the labels, sorted, each with an empty group."""
        names = {name for _, text in self._labelled() for name in _class_names(text)}
        return dict.fromkeys(sorted(names), "")

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers the labels, and the table of images by its
        size and the positions of its lines."""
        return table_slices(self._table_rows(), SCHEMA, rows_per_shard, scratch, self.images)

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a line that cannot be used is a row with a problem."""
        fs, path = file_system(self.images)
        with read_errors(self.images), fs.open(path, "rb") as file:
            for values in table_rows(piece):
                file.seek(int(values["stamp"]))
                yield self._row(values, file.readline(LONGEST_LINE))

    def schema(self) -> Mapping[str, type]:
        """``left_out`` counts unusable boxes and regions; ``boxes_digest`` shows a refresh which have changed."""
        return COLUMNS

    def _table_rows(self) -> Iterator[dict[str, Any]]:
        """The label of each line as text in ``boxes``; the record needs the image's size, which a worker reads."""
        starts = self._starts()
        nothing = {"caption": "", "objects": 0, "left_out": 0, "problem": ""}
        lines = 0
        for key, text in self._labelled():
            if lines < len(starts):
                start = str(starts[lines])
                yield {"url": key, "stamp": start, "boxes": text.encode("utf-8", "replace"), **nothing}
            lines += 1
        require(lines == len(starts), "labels", lines, f"{len(starts)} lines, as many as the table of images")

    def _labelled(self) -> Iterator[tuple[str, str]]:
        fs, path = file_system(self.labels)
        allowed = "a table of keys and JSON"
        try:
            with read_errors(self.labels), fs.open(path, "rt", encoding="utf-8", errors="replace") as file:
                for line in file:
                    key, _, text = line.rstrip("\r\n").partition("\t")
                    yield key, text
        except (OSError, ValueError) as error:
            raise unreadable("labels", self.labels, allowed, error) from error

    def _starts(self) -> list[int]:
        """The first byte of each line of the table of images."""
        allowed = "a table of keys and images"
        index = self.images.removesuffix(".tsv") + ".lineidx"
        fs, path = file_system(index)
        try:
            if fs.exists(path):
                with read_errors(index), fs.open(path, "rt") as file:
                    return [int(line) for line in file if line.strip()]
            with read_errors(self.images), fs.open(file_system(self.images)[1], "rb") as content:
                starts = [0]
                while line := content.readline(LONGEST_LINE):
                    starts.append(starts[-1] + len(line))
        except (OSError, ValueError) as error:
            raise unreadable("images", self.images, allowed, error) from error
        require(len(starts) > 1, "images", self.images, "a table with at least one line")
        return starts[:-1]

    def _row(self, values: Mapping[str, Any], line: bytes) -> Row:
        columns: dict[str, Scalar] = {
            "objects": 0,
            "left_out": 0,
            "boxes_digest": hashlib.sha256(values["boxes"]).hexdigest()[:16],
        }
        url = f"{self.images}#{values['url']}"
        key, _, content = line.rstrip(b"\r\n").partition(b"\t")
        try:
            image = _decoded(values["url"], key, content)
            record = record_of_label(values["boxes"].decode(), *_size(image))
        except SampleError as error:
            return Row(url=url, caption="", columns=columns, problem=error)
        except BAD as error:
            message = f"the label is not as described ({type(error).__name__}: {error})"
            problem = SampleError("failed_to_resize", "bad_annotation", " ".join(message.split())[:300])
            return Row(url=url, caption="", columns=columns, problem=problem)
        found = record.row(url)
        columns |= {"objects": found["objects"], "left_out": found["left_out"]}
        return Row(
            url=url,
            caption=record.caption,
            parts=(Part("image", image),),
            columns=columns,
            members={FIELD: found["boxes"]},
        )


def record_of_label(text: str, height: int, width: int) -> GroundingRecord:
    """The record of a label's JSON for an image of this size; raises as parsing another object does."""
    label = parse_json(text)
    if isinstance(label, dict) and "caption" in label:
        spans, boxes, scores = label.get("tokens_positive") or [], label.get("bboxes") or [], label.get("scores") or []
        if not len(spans) == len(boxes) or (scores and len(scores) != len(boxes)):
            raise ValueError(f"{len(boxes)} boxes, {len(spans)} spans and {len(scores)} scores")
        nested = [_nested(*one) for one in zip(spans, boxes, scores or [None] * len(boxes), strict=True)]
        return caption_record(height, width, str(label["caption"]), nested)
    objects = label["objects"] if isinstance(label, dict) else label
    return class_record(height, width, [(str(one["class"]), one["rect"], {}) for one in objects])


def _nested(span: Any, boxes: Any, scores: Any) -> GroundedRegion:
    """An entity: one span or several, and one box or several, each with a score."""
    spans = span if span and isinstance(span[0], list) else [span]
    single = bool(boxes) and not isinstance(boxes[0], list)
    numbers = [] if scores is None else [scores] if single else scores
    return GroundedRegion([boxes] if single else boxes, spans, [float(score) for score in numbers])


def _class_names(text: str) -> set[str]:
    try:
        label = parse_json(text)
        objects = label.get("objects", []) if isinstance(label, dict) else label
        return {str(one["class"]) for one in objects}
    except BAD:
        return set()


def _decoded(wanted: str, key: bytes, content: bytes) -> bytes:
    found = key.decode("utf-8", "replace")
    if found != wanted:
        raise SampleError("failed_to_download", "other_key", f"the table of images has {found[:80]!r} in this line")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("failed_to_download", "no_base64", f"the image is not in base64 ({error})") from error


def _size(image: bytes) -> tuple[int, int]:
    """Height and width, from the image's header."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(image)) as opened:
            return opened.height, opened.width
    except (OSError, ValueError, SyntaxError, TypeError, ArithmeticError) as error:
        raise SampleError("failed_to_resize", "not_an_image", f"cannot read the image's size ({error})") from error
