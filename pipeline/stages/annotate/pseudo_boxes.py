"""Pseudo boxes of the phrases of captions, as a sidecar.

Li, Zhang, Zhang et al., 2021, "Grounded Language-Image Pre-training", arXiv 2112.03857, section 3.3: a model that was
trained on boxes finds the phrases of captions in their images; another one is trained on what it found.

``00017.boxes.parquet`` has one row per sample of the tar: ``key``, ``height`` and ``width`` of the stored image,
``caption``, ``phrases`` (``start`` and ``end`` in code points of the caption; ``cut`` where the teacher's token limit
cut the phrase off), ``boxes`` (x1, y1, x2, y2 in pixels, float32, flattened), and, for each box, its score in
``scores`` and the number of its phrase in ``phrase``. An unreadable image has a height and width of 0.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import SidecarError
from pipeline.shards.objects import GroundedPhrase, Objects, is_span

JOB = "jobs/annotate_pseudo_boxes.py"
NAME = "boxes"

_PHRASE = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("cut", pa.bool_())])
COLUMNS: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "height": pa.int32(),
    "width": pa.int32(),
    "caption": pa.string(),
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
    key = row.get("key")
    try:
        height, width, caption = int(row["height"]), int(row["width"]), str(row["caption"] or "")
        boxes = np.array(row["boxes"], np.float64).reshape(-1, 4)
        scores, phrase_of = np.array(row["scores"], np.float64), [int(number) for number in row["phrase"]]
        phrases = [(int(one["start"]), int(one["end"])) for one in row["phrases"]]
        fits = len(boxes) == len(scores) == len(phrase_of) and all(0 <= one < len(phrases) for one in phrase_of)
        if not fits or not all(is_span(*one, caption) for one in phrases) or not np.isfinite(boxes).all():
            raise ValueError(f"{len(boxes)} boxes, {len(scores)} scores, {len(phrases)} phrases")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SidecarError(
            f"pseudo boxes of sample {key} are not as described ({error!r}); make them with {JOB}"
        ) from error
    if height <= 0 or width <= 0:
        return None
    boxes = boxes.clip(0, [width, height, width, height])
    kept = np.flatnonzero((scores >= least_score) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)).tolist()
    owners = [phrase_of[number] for number in kept]
    return Objects(
        height=height,
        width=width,
        boxes=boxes[kept],
        labels=tuple(caption[slice(*phrases[owner])] for owner in owners),
        segmentations=(None,) * len(kept),
        crowd=(False,) * len(kept),
        left_out=len(boxes) - len(kept),
        areas=(boxes[kept, 2:] - boxes[kept, :2]).prod(axis=1),
        caption=caption,
        phrases=tuple(
            GroundedPhrase(start, end, tuple(n for n, owner in enumerate(owners) if owner == number))
            for number, (start, end) in enumerate(phrases)
        ),
        open_labels=True,
        scores=scores[kept],
        key=str(key),
    )
