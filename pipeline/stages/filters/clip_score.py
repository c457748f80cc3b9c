"""CLIP score: the cosine of the CLIP embeddings of image and caption; CLAP score: of sound and caption.

LAION-400M keeps pairs from 0.3 (Schuhmann et al., 2021, arXiv 2111.02114), LAION-5B's English part from 0.28 (2022,
arXiv 2210.08402), both with OpenAI's ViT-B/32; other models have other scales. DataComp keeps the best fraction instead
(Gadre et al., 2023, arXiv 2304.14108: 30 % by ViT-L/14), which needs the quantile over all shards. Two passes over
histograms find it exactly, in constant memory.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.shards.media import MEDIA
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import Floats, ShardView

HALF = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ClipScore(Filter):
    """Drop pairs with a low CLIP score: ``clip_score``; ``no_score`` without embedding or score."""

    name: ClassVar[str] = "clip_score"
    rank: ClassVar[int] = 8
    scratch: ClassVar[tuple[str, ...]] = ("scores",)
    min_clip_score: float = 0.28
    clip_fraction: float | None = None
    """Fraction of samples with the highest scores to keep, above 0 to 1; replaces ``min_clip_score``. None = off."""
    score_column: str | None = None
    """Column of the shards' parquet with the score (LAION: similarity); None = compute it from the embeddings."""
    clip_medium: str = "image"
    """Medium that is compared with the caption: image, or audio for a CLAP score."""

    def check(self) -> None:
        """Require a valid cosine and a valid fraction."""
        require(-1 <= self.min_clip_score <= 1, "min_clip_score", self.min_clip_score, "-1 to 1")
        require(self.clip_medium in MEDIA, "clip_medium", self.clip_medium, ", ".join(MEDIA))
        part = self.clip_fraction
        require(part is None or 0 < part <= 1, "clip_fraction", part, "more than 0, at most 1, or none")

    def prepare(self, step: Step) -> None:
        """Find the threshold for a fraction."""
        if self.clip_fraction is not None:
            step.each_shard("scores", self._table)
            step.each_part("threshold", 1, self._threshold)

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Scores equal to the threshold are kept."""
        scores = self.scores(view)
        threshold = self.min_clip_score
        if self.clip_fraction is not None:
            threshold = step.read("threshold", 0)["threshold"][0].as_py()
        return Verdict({"no_score": np.isnan(scores), "clip_score": scores < np.float32(threshold)})

    def scores(self, view: ShardView) -> Floats:
        """Cosines float32 [n]; NaN without a score."""
        if self.score_column is not None:
            values = view.column(self.score_column)
            return np.array([np.nan if value is None else float(value) for value in values], np.float32)
        found = view.embeddings(medium=self.clip_medium)
        if found.text is None:
            raise DataError("the sidecar `embeddings` has no column `text`; make it again with text, or --score-column")
        cosines = np.einsum("nd,nd->n", found.features, found.text)
        return np.where(found.present, cosines, np.nan).astype(np.float32)

    def _table(self, view: ShardView) -> pa.Table:
        scores = self.scores(view)
        return pa.table({"score": scores[~np.isnan(scores)]})

    def _threshold(self, step: Step, number: int) -> pa.Table:
        count = len(step.shards)
        parts = (table["score"].to_numpy() for _, table in step.read_all("scores", count))
        high = sum((np.bincount(_ordered(part) >> 16, minlength=HALF) for part in parts), np.zeros(HALF, np.int64))
        wanted = math.ceil((self.clip_fraction or 0) * int(high.sum()))
        upper, rest = _bin_of(high, wanted)
        low = np.zeros(HALF, np.int64)
        for _, table in step.read_all("scores", count):
            ordered = _ordered(table["score"].to_numpy())
            low += np.bincount(ordered[ordered >> 16 == upper] & (HALF - 1), minlength=HALF)
        lower, _ = _bin_of(low, rest)
        return pa.table({"threshold": pa.array([_score(upper << 16 | lower)], pa.float32())})


def _ordered(scores: Floats) -> NDArray[np.int64]:
    """Integers below 2**32 in the order of the scores: IEEE bits, with inverted negatives."""
    bits = (scores + np.float32(0)).view(np.uint32).astype(np.int64)
    return np.where(bits >> 31, (1 << 32) - 1 - bits, bits + (1 << 31))


def _score(ordered: int) -> float:
    bits = ordered - (1 << 31) if ordered >> 31 else (1 << 32) - 1 - ordered
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def _bin_of(histogram: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin of the ``wanted``-th largest value, and its rank within that bin."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, max(wanted, 1)))
    if place == len(histogram):
        return 0, 1
    return len(histogram) - 1 - place, wanted - int(above[place] - histogram[::-1][place])
