"""Exact counts of pixels by class, from which all metrics of segmentation follow, and their sum over several processes.

Counts are integers that add up, so metrics do not depend on batches or on the number of processes. A set that is
evaluated in parts writes the counts of each part to a file of its own; the metrics are those of the sum.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.config import parse_json, require
from pipeline.errors import DataError
from pipeline.shards.objects import plain_word
from pipeline.shards.storage import Folder

ARRAYS = ("right", "labelled", "predicted")


class PixelCounts:
    """Pixels with the right class, of each class in the truth, and of each predicted class: int64 [C] each.

    No matrix of pairs of classes is kept: with tens of thousands of classes it would not fit in memory.
    """

    def __init__(self, classes: int) -> None:
        self.right, self.labelled, self.predicted = (np.zeros(classes, np.int64) for _ in ARRAYS)

    def add(self, truth: NDArray[Any], predicted: NDArray[Any]) -> None:
        """Count the pixels of an image: class numbers of equal shapes; negative truth is void and left out."""
        size, known = len(self.right), truth >= 0
        labels, found = truth[known], predicted[known]
        self.labelled += np.bincount(labels, minlength=size)
        self.predicted += np.bincount(found, minlength=size)
        self.right += np.bincount(labels[labels == found], minlength=size)

    def __iadd__(self, other: "PixelCounts") -> Self:
        """Add the counts of other images."""
        for name in ARRAYS:
            getattr(self, name).__iadd__(getattr(other, name))
        return self

    @property
    def pixels(self) -> int:
        """The number of pixels that are not void."""
        return int(self.labelled.sum())

    def overlap(self) -> NDArray[np.float64]:
        """Intersection over union of each class, float64 [C]; NaN where it is neither in truth nor in prediction."""
        union = self.labelled + self.predicted - self.right
        found: NDArray[np.float64] = np.divide(self.right, union, where=union > 0, out=np.full(len(union), np.nan))
        return found

    def metrics(self, names: Sequence[str], has_ground: bool) -> dict[str, float]:
        """See :func:`~pipeline.evaluation.segmentation.evaluate_segmentation`; the last class is the background.

        Empty without any pixel.
        """
        if not self.pixels:
            return {}
        overlap, occurs = self.overlap(), self.labelled > 0
        accuracy = (self.right[occurs] / self.labelled[occurs]).mean()
        found = {"miou": mean_of(overlap if has_ground else overlap[:-1]), "miou_foreground": mean_of(overlap[:-1])}
        found |= {"pixel_accuracy": float(self.right.sum() / self.pixels), "mean_accuracy": float(accuracy)}
        if has_ground:
            found["iou_background"] = mean_of(overlap[-1:])
        return found | by_word("iou", names, overlap[:-1])


def mean_of(values: NDArray[np.float64]) -> float:
    """The mean without NaN; 0 of nothing."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0


def by_word(prefix: str, names: Sequence[str], values: NDArray[Any]) -> dict[str, float]:
    """``<prefix>/<word>`` of each value that is a number, in names that metrics may have."""
    pairs = zip(names, values.tolist(), strict=True)
    plain = {re.sub(r"[^\w.\- ]", "_", plain_word(name)) or "_": value for name, value in pairs if np.isfinite(value)}
    return {f"{prefix}/{name}": float(value) for name, value in plain.items()}


@dataclass(frozen=True)
class CountedPart:
    """Part ``number`` of ``count``, from 0: every ``count``-th sample. ``folder`` is where parts write their counts."""

    number: int = 0
    count: int = 1
    folder: str = ""

    @classmethod
    def parse(cls, text: str, folder: str) -> "CountedPart":
        """``CountedPart(1, 4, folder)`` of ``2/4``.

        Raises:
            SettingError: another form, or a part without a folder.
        """
        allowed = "a part such as 2/4: the second of four"
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        require(found is not None, "part", text, allowed)
        assert found is not None
        number, count = int(found[1]), int(found[2])
        require(1 <= number <= count, "part", text, allowed)
        require(bool(folder) or count == 1, "counts", folder, "a folder for the counts of all parts")
        return cls(number - 1, count, folder)

    def file(self, number: int) -> str:
        """The name of the file of a part."""
        return f"part-{number + 1}-of-{self.count}.json"


def sum_of_parts(
    counts: PixelCounts, samples: int, part: CountedPart, about: Mapping[str, Any]
) -> tuple[PixelCounts, int]:
    """Write the counts of this part; return the sum of all parts that exist by now, and their number of samples.

    Args:
        counts: those of this part.
        samples: the number of its images.
        part: which one it is.
        about: what all parts must have in common: the words and the model.

    Raises:
        DataError: a part of another model or other words, or a damaged one.
    """
    folder, classes = Folder(part.folder), len(counts.right)
    others = [part.file(number) for number in range(part.count) if number != part.number]
    for name in set(others) & set(folder.names(".json")):  # before the own counts replace those of another model
        _read_part(folder, name, about, classes)
    own = {**about, "samples": samples, **{name: getattr(counts, name).tolist() for name in ARRAYS}}
    folder.write_atomic(part.file(part.number), json.dumps(own).encode())
    total, images = counts, samples
    for name in set(others) & set(folder.names(".json")):
        some, count = _read_part(folder, name, about, classes)
        total += some
        images += count
    return total, images


def _read_part(folder: Folder, name: str, about: Mapping[str, Any], classes: int) -> tuple[PixelCounts, int]:
    place = folder.join(name)
    try:
        record: Any = parse_json(folder.read_text(name))
        same = all(record[key] == value for key, value in about.items())
        counts, samples = PixelCounts(classes), int(record["samples"])
        for key in ARRAYS if same else ():
            getattr(counts, key)[:] = record[key]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is no file of counts ({error!r}): remove it and evaluate that part again") from error
    if not same:
        raise DataError(f"{place} has the counts of another model or of other words: use another folder of counts")
    return counts, samples
