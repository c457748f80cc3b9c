"""A hook for classifiers that return a score: safety, aesthetics, watermarks.

``--classifier package.module:function`` names a function of one batch of at most 256 samples that returns one float per
sample: float32 [n]. With ``classifier_input`` "embeddings" it gets the image embeddings, L2-normalised float32 [n, D],
from the sidecar ``embeddings``; with "pictures" a list of n encoded images (bytes). It must be importable in every
worker (``ray job submit --working-dir .`` uploads the working folder), and should load its weights once, outside the
function. LAION-5B's thresholds (arXiv 2210.08402): unsafe from 0.5, aesthetic from 5.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import Floats, ShardView

BATCH = 256
Score = Callable[[Any], Sequence[float] | NDArray[np.floating]]


@dataclass(frozen=True, kw_only=True)
class ClassifierFilter(Filter):
    """Drop samples with scores outside the bounds: ``classifier``; ``no_embedding`` or ``no_picture`` without input."""

    name: ClassVar[str] = "classifier"
    rank: ClassVar[int] = 11
    classifier: str = ""
    """``package.module:function``."""
    classifier_input: Literal["embeddings", "pictures"] = "embeddings"
    min_classifier_score: float | None = None
    max_classifier_score: float | None = None

    def check(self) -> None:
        """Require an importable function and a bound."""
        load_function(self.classifier)
        least, most = self.min_classifier_score, self.max_classifier_score
        require(least is not None or most is not None, "min_classifier_score", least, "a bound here or as the maximum")

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Scores of the samples that have the classifier's input."""
        scores = np.zeros(len(view), np.float32)
        missing = np.zeros(len(view), bool)
        for rows, batch, there in self._batches(view):
            missing[rows] = ~there
            if there.any():
                scores[rows[there]] = self._scores(batch, int(there.sum()))
        # NaN scores are outside of any bounds.
        outside = np.isnan(scores)
        if self.min_classifier_score is not None:
            outside |= scores < self.min_classifier_score
        if self.max_classifier_score is not None:
            outside |= scores > self.max_classifier_score
        lacks = "no_picture" if self.classifier_input == "pictures" else "no_embedding"
        return Verdict({lacks: missing, "classifier": outside})

    def _scores(self, batch: Any, count: int) -> Floats:
        scores = np.asarray(load_function(self.classifier)(batch), np.float32)
        if scores.shape != (count,):
            raise DataError(f"classifier {self.classifier} gave scores of shape {scores.shape} for {count} samples")
        return scores

    def _batches(self, view: ShardView) -> Iterator[tuple[NDArray[np.int64], Any, NDArray[np.bool_]]]:
        """Row numbers, the classifier's input, and the rows it is for."""
        if self.classifier_input == "embeddings":
            embeddings = view.embeddings(text=False)
            for start in range(0, len(view), BATCH):
                there = embeddings.present[start : start + BATCH]
                rows = np.arange(start, start + len(there))
                yield rows, embeddings.features[rows[there]], there
            return
        images = view.images()
        for start in range(0, len(view), BATCH):
            batch = [image for image, _ in zip(images, range(min(BATCH, len(view) - start)), strict=False)]
            there = np.array([image is not None for image in batch], bool)
            yield np.arange(start, start + len(batch)), [image for image in batch if image is not None], there


@functools.cache
def load_function(name: str) -> Score:
    """Import the function ``package.module:function``.

    Raises:
        SettingError: no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        require(False, "classifier", name, f"package.module:function that can be imported ({error})")
        raise
    require(callable(found), "classifier", name, "package.module:function of a callable")
    loaded: Score = found
    return loaded
