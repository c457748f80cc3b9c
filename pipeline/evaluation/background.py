"""The background of a segmentation: pixels whose best word has a probability below a threshold.

    0.4              one threshold for all words
    FILE.json        one for each word: {"cat": 0.3, "dog": 0.55}; words that are not in it have 0
    learn:DATA       one for each word: that with its largest intersection over union on another labelled set

With ``relative`` a threshold is lowered to the largest probability in the image, as GroupViT does in its windows
(arXiv 2202.11094), so that an image is never all background.

Thresholds of different words do not influence each other's intersection over union: a pixel has its best word or is
background. So with the number T of pixels of a word in the truth, of pixels that have it as the best word with a
probability of t or more R right and F wrong ones

    IoU(t) = R(t) / (T + F(t))

and the best t is exact, among multiples of 1/1000, from two histograms of probabilities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.evaluation.classes import json_of
from pipeline.models.segments import Segmentation
from pipeline.shards.objects import plain_word

STEPS = 1000
GRID = (np.arange(STEPS + 1) / STEPS).astype(np.float32)
LEARN = "learn:"
ALLOWED = "a number from 0 to 1 or a JSON file {word: number}"


@dataclass(frozen=True)
class Background:
    """When a pixel is background. ``thresholds`` are one for all words, or one for each."""

    thresholds: tuple[float, ...] = (0.0,)
    relative: bool = False

    def where(self, found: Segmentation) -> Tensor:
        """Bool [H, W]: the pixels of a result that are background, also those without a word."""
        limits = torch.tensor(self.thresholds)
        if len(limits) > 1:
            limits = limits[found.labels.long().clamp(min=0)]
        if self.relative and found.scores.numel():
            limits = limits.minimum(found.scores.max())
        return found.below(limits) | (found.labels < 0)

    def removed(self, found: Segmentation) -> Segmentation:
        """The result without a word (-1) where a pixel is background."""
        return replace(found, labels=torch.where(self.where(found), -1, found.labels).to(torch.int16))

    def of_word(self, number: int) -> "Background":
        """The rule for the word of this number alone, beside one that stands for all else."""
        return Background((self.thresholds[number if len(self.thresholds) > 1 else 0], 0.0), self.relative)


def read_thresholds(setting: float | str, words: Sequence[str], field: str, rest: int = 0) -> tuple[float, ...]:
    """The thresholds for the option ``field``, a number or a JSON file, and 0 for ``rest`` further words.

    Raises:
        SettingError: neither, no number from 0 to 1, or a word that is none of ``words``.
    """
    if _is_number(setting):
        values: tuple[float, ...] = (float(setting),)
    else:
        values = (*_of_words(str(setting), words, field), *(0.0 for _ in range(rest)))
    require(all(0 <= value <= 1 for value in values), field, setting, ALLOWED)
    return values


def _is_number(setting: float | str) -> bool:
    try:
        float(setting)
    except ValueError:
        return False
    return True


def _of_words(place: str, words: Sequence[str], field: str) -> list[float]:
    content = json_of(field, place, ALLOWED)
    if not isinstance(content, Mapping) or not all(type(value) in (int, float) for value in content.values()):
        raise SettingError(field, place, "a JSON file that maps words to numbers from 0 to 1")
    given = {plain_word(word): float(value) for word, value in content.items()}
    unknown = sorted(set(given) - set(map(plain_word, words)))
    others = f"thresholds of the words; not {', '.join(unknown[:5])}"
    require(not unknown, field, place, others)
    return [given.get(plain_word(word), 0.0) for word in words]


class ThresholdCounts:
    """Histograms of probabilities, from which the best threshold of each word follows.

    ``right`` and ``wrong`` are int64 [C, 1001]: pixels with the best word c, by probability; ``labelled`` int64 [C].
    """

    def __init__(self, words: int) -> None:
        self.right, self.wrong = (np.zeros((words, STEPS + 1), np.int64) for _ in range(2))
        self.labelled = np.zeros(words, np.int64)

    def add(self, truth: NDArray[Any], found: Segmentation, relative: bool) -> None:
        """Count an image: its class numbers [H, W], negative where void, and what a model found.

        Pixels that a relative rule keeps in any case, and those at the method's own limit, count as certain.
        """
        words = len(self.labelled)
        scores, labels = found.scores.float(), found.labels.numpy()
        kept = ~found.below(torch.full_like(scores, 2.0))
        if relative and scores.numel():
            kept |= scores >= scores.max()
        certain = torch.where(kept, 1.0, scores).numpy()
        known = truth >= 0
        self.labelled += np.bincount(truth[known & (truth < words)], minlength=words)
        used = known & (labels >= 0) & (labels < words)
        bins = np.searchsorted(GRID, certain[used], side="right") - 1
        places = labels[used].astype(np.int64) * (STEPS + 1) + bins.clip(0, STEPS)
        right = labels[used] == truth[used]
        for histogram, mask in ((self.right, right), (self.wrong, ~right)):
            histogram += np.bincount(places[mask], minlength=histogram.size).reshape(histogram.shape)

    def best(self) -> tuple[float, ...]:
        """The lowest of the best thresholds of each word.

        A word that is never found, or that the truth does not have, gets the threshold that is best for all words
        together.
        """
        overlap = _overlaps(self.right, self.wrong, self.labelled)
        together = _overlaps(self.right.sum(axis=0), self.wrong.sum(axis=0), self.labelled.sum())
        common = int(together.argmax())
        places = np.where(overlap.max(axis=-1) > 0, overlap.argmax(axis=-1), common)
        return tuple(GRID[places].tolist())


def _overlaps(right: NDArray[np.int64], wrong: NDArray[np.int64], labelled: Any) -> NDArray[np.float64]:
    """Intersection over union for each threshold of the grid, float64 of the shape of ``right``."""
    kept_right, kept_wrong = (one[..., ::-1].cumsum(axis=-1)[..., ::-1] for one in (right, wrong))
    union = np.asarray(labelled)[..., None] + kept_wrong
    found: NDArray[np.float64] = np.divide(kept_right, union, where=union > 0, out=np.zeros(right.shape))
    return found
