"""The tables of GLIP's code: images in base64, and their labels as JSON.

    images.tsv       KEY <tab> base64 of the encoded image; of several columns the last one counts
    images.lineidx   the byte at which each line of it begins, one number per line; made here if there is none
    labels.tsv       KEY <tab> JSON, line by line for the same keys
    train.linelist   the lines that are read, from 0 on, one number per line, in this order; a line may be repeated
    train.yaml       the names of these files: img, label, linelist, labelmap, imageid2idx; relative to its folder

    jobs/refresh_dataset.py glip-tsv --images images.tsv --labels labels.tsv --output-folder cc3m-glip
    jobs/refresh_dataset.py glip-tsv --images train.yaml --output-folder objects365

A label is a list of boxes, ``[{"class": "person", "rect": [x1, y1, x2, y2]}]``, also below ``objects``, or a caption
with phrases: ``{"caption", "tokens_positive", "bboxes", "scores"}`` with one box for each span (version 1) or a list of
boxes for each (version 2). Where images have several captions, ``imageid2idx`` gives the line of the image of a label,
``{"img_id": line}``.
"""

import base64
import binascii
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from typing import Any, ClassVar

from PIL import Image

from pipeline.config import parse_json, require
from pipeline.errors import SampleError
from pipeline.shards.objects import FIELD
from pipeline.shards.storage import Folder, file_system, read_errors
from pipeline.sources.annotation_table import table_rows, table_slices
from pipeline.sources.glip_tables import (
    LONGEST_LINE,
    image_line,
    image_lines,
    labelled_lines,
    line_numbers,
    line_starts,
    mapped_classes,
    named_files,
)
from pipeline.sources.grounding_records import (
    BAD,
    COLUMNS,
    SCHEMA,
    GroundedRegion,
    GroundingRecord,
    caption_record,
    class_record,
    listed_classes,
)
from pipeline.sources.source import UNCHANGED, Part, Row, Scalar, Slice

OTHER_IMAGE = "the index of images has no line for the label's img_id"


@dataclass(frozen=True, kw_only=True)
class GlipTsv:
    """The lines of both tables, in their order."""

    kind: ClassVar[str] = "glip-tsv"
    summary: ClassVar[str] = "GLIP's tables (tsv) of images in base64 and of boxes or captions with phrases."
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    has_captions: ClassVar[bool] = True

    images: str
    """Table of the images, as a path or fsspec URI that every worker can read; its .lineidx is used where it exists. Or
    GLIP's YAML file, which names all tables."""
    labels: str = ""
    """Table of the labels, as a path or fsspec URI: the same keys in the same order, unless there is an image_index."""
    linelist: str = ""
    """File of the numbers of the lines to read, one per line; empty for all lines."""
    image_index: str = ""
    """JSON file with the line of the image of each label's img_id; empty if the lines of both tables correspond."""
    label_map: str = ""
    """File of the classes: JSON with label_to_idx, or one name per line; empty for those of the labels."""

    def __post_init__(self) -> None:
        require(bool(self.images), "images", self.images, "a table of images (.tsv), or a .yaml file")

    @cached_property
    def classes(self) -> Mapping[str, str]:
        """The class names of the label map in its order, or those of the labels, sorted; each with an empty group."""
        files = self._files
        if files.label_map:
            return dict.fromkeys(mapped_classes(files.label_map), "")
        lines = labelled_lines(files.labels, line_starts("labels", files.labels))
        return listed_classes(name for _, text in lines for name in _class_names(text))

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers the labels, and the table of images by its
        size and the positions of its lines."""
        return table_slices(self._table_rows(), SCHEMA, rows_per_shard, scratch, self._files.images)

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a line that cannot be used is a row with a problem."""
        images = self._files.images
        fs, path = file_system(images)
        with read_errors(images), fs.open(path, "rb") as file:
            for values in table_rows(piece):
                file.seek(int(values["stamp"] or 0))
                yield self._row(values, b"" if values["problem"] else file.readline(LONGEST_LINE))

    def schema(self) -> Mapping[str, type]:
        """``left_out`` counts unusable boxes and regions; ``boxes_digest`` shows a refresh which have changed."""
        return COLUMNS

    @cached_property
    def _files(self) -> "GlipTsv":
        """The settings with the files that the YAML file names."""
        files = self
        if self.images.endswith((".yaml", ".yml")):
            named = named_files(self.images)
            given = {name: getattr(self, name) for name in named if name != "images" and getattr(self, name)}
            files = replace(self, **{**named, **given})
        require(bool(files.labels), "labels", files.labels, "a table of labels (.tsv)")
        return files

    def _table_rows(self) -> Iterator[dict[str, Any]]:
        """The label of each line as text in ``boxes``; the record needs the image's size, which a worker reads."""
        files = self._files
        images, labels = line_starts("images", files.images), line_starts("labels", files.labels)
        lines = line_numbers(files.linelist, len(labels)) if files.linelist else range(len(labels))
        index = image_lines(files.image_index) if files.image_index else None
        allowed = f"{len(images)} lines, as many as the table of images"
        require(index is not None or len(labels) == len(images), "labels", len(labels), allowed)
        nothing = {"caption": "", "objects": 0, "left_out": 0}
        texts = labelled_lines(files.labels, (labels[line] for line in lines))
        for line, (key, text) in zip(lines, texts, strict=True):
            place = line if index is None else image_line(text, index, len(images))
            known = (
                {"stamp": "", "problem": OTHER_IMAGE} if place is None else {"stamp": str(images[place]), "problem": ""}
            )
            yield {"url": key, "boxes": text.encode("utf-8", "replace"), **known, **nothing}

    def _row(self, values: Mapping[str, Any], line: bytes) -> Row:
        columns: dict[str, Scalar] = {
            "objects": 0,
            "left_out": 0,
            "boxes_digest": hashlib.sha256(values["boxes"]).hexdigest()[:16],
        }
        url = f"{self.images}#{values['url']}"
        try:
            if values["problem"]:
                raise SampleError("failed_to_download", "no_image", values["problem"])
            image = self._decoded(values["url"], line)
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

    def _decoded(self, wanted: str, line: bytes) -> bytes:
        key, *_, content = line.rstrip(b"\r\n").split(b"\t") if b"\t" in line else (line, b"")
        found = key.decode("utf-8", "replace")
        if found != wanted and not self._files.image_index:
            raise SampleError("failed_to_download", "other_key", f"the table of images has {found[:80]!r} in this line")
        try:
            return base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SampleError("failed_to_download", "no_base64", f"the image is not in base64 ({error})") from error


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
    return GroundedRegion([boxes] if single else boxes, spans, numbers)


def _class_names(text: str) -> set[str]:
    try:
        label = parse_json(text)
        objects = label.get("objects", []) if isinstance(label, dict) else label
        return {str(one["class"]) for one in objects}
    except BAD:
        return set()


def _size(image: bytes) -> tuple[int, int]:
    """Height and width, from the image's header."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(image)) as opened:
            return opened.height, opened.width
    except (OSError, ValueError, SyntaxError, TypeError, ArithmeticError) as error:
        raise SampleError("failed_to_resize", "not_an_image", f"cannot read the image's size ({error})") from error
