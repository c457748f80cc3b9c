"""Pseudo boxes of the phrases of captions, as a sidecar.

Li, Zhang, Zhang et al., 2021, "Grounded Language-Image Pre-training", arXiv 2112.03857, section 3.3: a model that was
trained on boxes finds the phrases of captions in their images; another one is trained on what it found.

``00017.boxes.parquet`` has one row per sample of the tar: ``key``, ``height`` and ``width`` of the stored image,
``captions``, ``phrases`` of all of them (the number of the ``caption``; ``start`` and ``end`` in its code points;
``cut`` where the teacher's token limit cut the phrase off), ``boxes`` (x1, y1, x2, y2 in pixels, float32, flattened),
and, for each box, its score in ``scores`` and the number of its phrase in ``phrase``. An unreadable image has a height
and width of 0.

A reader reads an image with one of its captions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import from_plain
from pipeline.errors import SettingError, SidecarError
from pipeline.shards.objects import GroundedCaption, GroundedPhrase, Objects, is_span
from pipeline.shards.sidecar import read_sidecar, read_sidecar_schema, sidecar_facts, sidecar_file
from pipeline.shards.snapshot import Shard
from pipeline.shards.storage import Folder

JOB = "jobs/annotate_pseudo_boxes.py"
NAME = "boxes"
BINS = 20
WHOLE = 0.9

_PHRASE = pa.struct([("caption", pa.int32()), ("start", pa.int32()), ("end", pa.int32()), ("cut", pa.bool_())])
COLUMNS: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "height": pa.int32(),
    "width": pa.int32(),
    "captions": pa.list_(pa.string()),
    "phrases": pa.list_(_PHRASE),
    "boxes": pa.list_(pa.float32()),
    "scores": pa.list_(pa.float32()),
    "phrase": pa.list_(pa.int32()),
}
SCHEMA = pa.schema(COLUMNS)


def objects_of_row(row: Mapping[str, Any], least_score: float = 0.0) -> Objects | None:
    """The boxes of a row with a score of at least ``least_score``, labelled with their phrases.

    ``None`` where the image was unreadable.

    Raises:
        SidecarError: the row is not as described above.
    """
    try:
        height, width, captions = int(row["height"]), int(row["width"]), [str(one) for one in row["captions"]]
        boxes = np.array(row["boxes"], np.float64).reshape(-1, 4)
        scores, phrase_of = np.array(row["scores"], np.float64), [int(number) for number in row["phrase"]]
        phrases = [(int(one["caption"]), int(one["start"]), int(one["end"])) for one in row["phrases"]]
        fits = len(boxes) == len(scores) == len(phrase_of) and all(0 <= one < len(phrases) for one in phrase_of)
        spans = all(0 <= of < len(captions) and is_span(start, end, captions[of]) for of, start, end in phrases)
        if not fits or not spans or not np.isfinite(boxes).all():
            raise ValueError(f"{len(boxes)} boxes, {len(scores)} scores, {len(phrases)} phrases")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SidecarError(
            f"pseudo boxes of sample {row.get('key')} are not as described ({error!r}); make them with {JOB}"
        ) from error
    if height <= 0 or width <= 0:
        return None
    boxes = boxes.clip(0, [width, height, width, height])
    kept = np.flatnonzero((scores >= least_score) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)).tolist()
    owners = [phrase_of[number] for number in kept]
    texts = [captions[of][start:end] for of, start, end in phrases]
    first, *more = _grounded(captions or [""], phrases, owners)
    return Objects(
        height=height,
        width=width,
        boxes=boxes[kept],
        labels=tuple(texts[owner] for owner in owners),
        segmentations=(None,) * len(kept),
        crowd=(False,) * len(kept),
        left_out=len(boxes) - len(kept),
        areas=(boxes[kept, 2:] - boxes[kept, :2]).prod(axis=1),
        caption=first.text,
        phrases=first.phrases,
        more_captions=tuple(more),
        open_labels=True,
        scores=scores[kept],
        key=str(row.get("key")),
    )


def _grounded(
    captions: Sequence[str], phrases: Sequence[tuple[int, int, int]], owners: Sequence[int]
) -> list[GroundedCaption]:
    """The captions with their phrases; ``owners`` are the phrases of the kept boxes."""
    numbers: dict[int, list[int]] = {}
    for number, owner in enumerate(owners):
        numbers.setdefault(owner, []).append(number)
    spans: dict[int, list[GroundedPhrase]] = {}
    for number, (of, start, end) in enumerate(phrases):
        spans.setdefault(of, []).append(GroundedPhrase(start, end, tuple(numbers.get(number, ()))))
    return [GroundedCaption(text, tuple(spans.get(number, ()))) for number, text in enumerate(captions)]


@dataclass(frozen=True, kw_only=True)
class PseudoBoxCounts:
    """What was found in the images of a shard, or of several.

    - ``without_caption`` and ``without_boxes`` count images; all but ``images`` and ``unreadable`` count readable ones.
    - ``without_phrases`` counts captions.
    - ``phrases`` are the usable ones: of them, ``cut`` are beyond the teacher's token limit, and ``found`` have a box.
      ``unusable`` phrases are empty or outside of their caption.
    - ``histogram`` counts boxes by score, in ``BINS`` bins of equal width from 0 to 1. A box is ``whole`` if it covers
      ``WHOLE`` of its image or more.
    """

    images: int = 0
    unreadable: int = 0
    without_caption: int = 0
    captions: int = 0
    without_phrases: int = 0
    without_boxes: int = 0
    phrases: int = 0
    unusable: int = 0
    cut: int = 0
    found: int = 0
    whole: int = 0
    histogram: tuple[int, ...] = (0,) * BINS

    def __add__(self, other: "PseudoBoxCounts") -> "PseudoBoxCounts":
        counts = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "histogram"}
        histogram = tuple(a + b for a, b in zip(self.histogram, other.histogram, strict=True))
        return PseudoBoxCounts(**counts, histogram=histogram)

    @property
    def boxes(self) -> int:
        """The number of boxes."""
        return sum(self.histogram)

    def boxes_from(self, score: float) -> int:
        """The number of boxes with at least ``score``, rounded up to the next bin."""
        return sum(self.histogram[math.ceil(round(score * BINS, 6)) :])

    def metrics(self) -> dict[str, float]:
        """Counts, and the paper's ratios: boxes per caption, with a score of 0.5 or more too, and phrases found."""
        captions = max(self.captions, 1)
        counts = {name: float(value) for name, value in vars(self).items() if name != "histogram"}
        return counts | {
            "boxes": float(self.boxes),
            "boxes_per_caption": self.boxes / captions,
            "confident_boxes_per_caption": self.boxes_from(0.5) / captions,
            "phrases_found": self.found / max(self.phrases, 1),
            "whole_image_boxes": self.whole / max(self.boxes, 1),
        }

    def __str__(self) -> str:
        found = self.metrics()
        share = f"{self.found} of {self.phrases} phrases found ({found['phrases_found']:.1%})"
        boxes = (
            f"{self.boxes} boxes, {found['boxes_per_caption']:.2f} per caption, {self.boxes_from(0.5)} of them from 0.5"
        )
        others = f"phrases beyond the token limit: {self.cut}, captions without phrases: {self.without_phrases}"
        return f"{boxes}; {share}; {found['whole_image_boxes']:.1%} of the boxes fill their image; {others}"


def counts_of_row(row: Mapping[str, Any]) -> PseudoBoxCounts:
    """The counts of one row; ``unusable`` phrases are not in it."""
    readable = row["height"] > 0
    phrases, captions = (row["phrases"], len(row["captions"])) if readable else ([], 0)
    boxes = np.array(row["boxes"], np.float64).reshape(-1, 4)
    area = max(row["height"] * row["width"], 1)
    places = np.minimum(np.array(row["scores"], np.float64) * BINS, BINS - 1).astype(int)
    return PseudoBoxCounts(
        images=1,
        unreadable=int(not readable),
        without_caption=int(readable and not captions),
        captions=captions,
        without_phrases=captions - len({one["caption"] for one in phrases}),
        without_boxes=int(readable and not len(boxes)),
        phrases=len(phrases),
        cut=sum(one["cut"] for one in phrases),
        found=len(set(row["phrase"])),
        whole=int(((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) >= WHOLE * area).sum()),
        histogram=tuple(np.bincount(places, minlength=BINS).tolist()),
    )


def read_pseudo_boxes(folder: Folder, shard: Shard, name: str = NAME) -> list[dict[str, Any]]:
    """The rows of ``shard``'s sidecar, in the order of its tar.

    Raises:
        SidecarError: missing, of another tar, or without pseudo boxes.
    """
    table = read_sidecar(folder, shard, name, JOB)
    if not set(COLUMNS) <= set(table.column_names):
        raise SidecarError(f"{folder.join(sidecar_file(shard, name))} holds no pseudo boxes; make it with {JOB}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def read_counts(folder: Folder, shard: Shard, name: str = NAME) -> PseudoBoxCounts:
    """The counts in the metadata of a sidecar; the boxes are not read.

    Raises:
        SidecarError: missing, of another tar, or without such counts.
    """
    file = folder.join(sidecar_file(shard, name))
    facts = sidecar_facts(read_sidecar_schema(folder, shard, name, JOB), file, JOB)
    try:
        return from_plain(PseudoBoxCounts, facts["counts"], file)
    except (KeyError, SettingError) as error:
        raise SidecarError(
            f"{file} holds no counts of pseudo boxes ({error}); make it again with --overwrite"
        ) from error
