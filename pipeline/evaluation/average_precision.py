"""Average precision of detections, COCO's and LVIS's, boxes and masks.

Lin et al. 2014, "Microsoft COCO" (arXiv 1405.0312) and its evaluator; Gupta, Dollar, Girshick 2019, "LVIS" (arXiv
1908.03195), section 3. Detections of a class are sorted by score. Each matches the unmatched object of its class with
the largest overlap, if that is at least the threshold. AP is the mean precision at 101 recalls, over thresholds 0.5,
0.55, ... 0.95 and over classes that occur. Objects marked as crowds may be matched any number of times and are not
counted. Small, medium and large objects have areas up to 32^2, 96^2 and more pixels.

In federated data (LVIS) each image is annotated for some classes only. Detections of a class that is neither annotated
nor known to be absent are not counted; for a class with incomplete annotations, false detections are not counted
either. LVIS counts the 300 best detections per image, COCO the 100 best per class.

Fixed AP (Dave, Dollar, Ramanan, Kirillov, Girshick 2021, arXiv 2102.01066) has no limit per image. It counts the 10,000
best detections of each class over the data set, so classes do not compete for the places of an image.

faster-coco-eval does the counting, for some classes at a time, because its memory grows with images times classes.
"""

import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from faster_coco_eval.core import mask as rle
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.models.detections import Detections
from pipeline.shards.objects import Objects, plain_word
from pipeline.shards.segmentation import mask_of, run_lengths_at

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Overlap = Literal["bbox", "segm"]

MOST_FEDERATED, MOST = 300, 100  # detections: per image in LVIS, per class and image in COCO
MOST_FIXED = 10_000  # detections per class over the data set in fixed AP
CLASSES_AT_ONCE = 64
HALF, THREE_QUARTERS = 0, 5  # indices of thresholds 0.5 and 0.75
SIZES = {"": 0, "s": 1, "m": 2, "l": 3}  # the evaluator's order of areas


@dataclass
class AveragePrecision:
    """Collects images with :meth:`add`, then computes :meth:`metrics`.

    ``groups`` are sets of words (base, novel; rare, common, frequent) with an AP of their own: the mean over the
    group's classes while all words compete, which is generalised zero-shot detection. Words and labels are compared by
    :func:`~pipeline.shards.objects.plain_word`. ``fixed`` computes fixed AP.
    """

    words: Sequence[str]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    images: int = 0
    with_masks: bool = True
    federated: bool = False
    fixed: bool = False

    def __post_init__(self) -> None:
        self._number = {plain_word(word): number for number, word in enumerate(self.words)}
        self._sizes: list[tuple[int, int]] = []
        self._objects: list[list[Record]] = [[] for _ in self.words]
        self._found: list[list[Record]] = [[] for _ in self.words]
        self._scores = [array("d") for _ in self.words]  # of all detections, also of those that are not counted
        self._unknown: set[str] = set()

    def add(self, marked: Objects, found: Detections) -> None:
        """Add one image: its annotated objects, and the detections, whose labels are indices into the words.

        Mask AP is computed only if all objects and detections of all images have masks.

        Raises:
            DataError: an invalid segmentation.
        """
        labels = [self._number.get(plain_word(label), -1) for label in marked.labels]
        self._unknown |= {label for label, number in zip(marked.labels, labels, strict=True) if number < 0}
        self.federated |= marked.federated
        self.with_masks &= found.masks is not None
        if self.with_masks:
            self._check_masks(marked, labels)
        for place, number in enumerate(labels):
            if number >= 0:
                self._objects[number].append(self._marked(marked, place))
        self._add_found(marked, found, labels)
        self._sizes.append((marked.height, marked.width))
        self.images += 1

    def metrics(self) -> dict[str, float]:
        """``ap``, ``ap50``, ``ap75``, ``aps``, ``apm``, ``apl``, ``ap_<group>``, ``ap50_<group>``, and ``mask_`` with
        the same, 0 to 1. Metrics without any object are left out.

        Raises:
            DataError: no object has a label that is one of the words.
        """
        if not any(self._objects):
            some = ", ".join(map(repr, sorted(self._unknown)[:5])) or "none"
            words = ", ".join(map(repr, self.words[:5]))
            raise DataError(f"none of the labels in {self.images} images ({some}) is one of the words ({words})")
        found = self._averages(self.precision("bbox"))
        masks = self._averages(self.precision("segm")) if self.with_masks else {}
        return found | {f"mask_{name}": value for name, value in masks.items()}

    def precision(self, overlap: Overlap) -> NDArray[np.float64]:
        """[10 thresholds, 101 recalls, words, 4 sizes]: -1 for words without an object of that size."""
        numbers = range(len(self.words))
        parts = [self._counted(numbers[at : at + CLASSES_AT_ONCE], overlap) for at in numbers[::CLASSES_AT_ONCE]]
        return np.concatenate(parts, axis=2)

    def _averages(self, precision: NDArray[np.float64]) -> dict[str, float]:
        values: dict[str, float | None] = {f"ap{size}": _mean(precision[..., n]) for size, n in SIZES.items()}
        whole = precision[..., SIZES[""]]
        values |= {"ap50": _mean(whole[HALF]), "ap75": _mean(whole[THREE_QUARTERS])}
        for group, words in self.groups.items():
            numbers = [self._number[plain_word(word)] for word in words]
            values |= {f"ap_{group}": _mean(whole[:, :, numbers]), f"ap50_{group}": _mean(whole[HALF][:, numbers])}
        return {name: value for name, value in values.items() if value is not None}

    def _check_masks(self, marked: Objects, labels: Sequence[int]) -> None:
        """Disable mask AP at the first object without a mask; warns once."""
        for place, number in enumerate(labels):
            if number >= 0 and marked.segmentations[place] is None:
                bare = f"object {place} ({marked.labels[place]}) of sample {marked.key} has no segmentation"
                logger.warning("%s: mask AP is not computed, box AP is", bare)
                self.with_masks = False
                return

    def _marked(self, marked: Objects, place: int) -> Record:
        x, y, right, bottom = marked.boxes[place].tolist()
        return {
            "image_id": self.images + 1,
            "bbox": [x, y, right - x, bottom - y],
            "area": float(marked.areas[place]),
            "iscrowd": int(marked.crowd[place]),
            "exhaustive": plain_word(marked.labels[place]) not in set(map(plain_word, marked.incomplete)),
            "segmentation": self._runs(marked, place) if self.with_masks else None,
        }

    @staticmethod
    def _runs(marked: Objects, place: int) -> Record:
        try:
            return coco_runs(marked.segmentations[place], marked.height, marked.width)
        except DataError as error:
            raise DataError(f"object {place} ({marked.labels[place]}) of sample {marked.key}: {error}") from error

    def _add_found(self, marked: Objects, found: Detections, labels: Sequence[int]) -> None:
        """Store the detections that count; LVIS's uncounted ones take no memory."""
        searched = set(range(len(self.words)))
        incomplete = {self._number.get(plain_word(label), -1) for label in marked.incomplete}
        if marked.federated:
            searched = {*labels, *(self._number.get(plain_word(label), -1) for label in marked.negative)}
        numbers = found.labels.tolist()[: MOST_FEDERATED if marked.federated and not self.fixed else None]
        ranks = self._ranked(numbers, found.scores.tolist()) if self.fixed else [0] * len(numbers)
        kept = [place for place, number in enumerate(numbers) if number in searched]
        for place, (x, y, right, bottom) in zip(kept, found.boxes[kept].double().tolist(), strict=True):
            self._found[numbers[place]].append(
                {
                    "image_id": self.images + 1,
                    "bbox": [x, y, right - x, bottom - y],
                    "score": float(found.scores[place]),
                    "exhaustive": numbers[place] not in incomplete,
                    "place": ranks[place],
                    "segmentation": _found_runs(found, place, marked) if self.with_masks else None,
                }
            )

    def _ranked(self, numbers: Sequence[int], scores: Sequence[float]) -> list[int]:
        """Store the scores of detections by class; returns the place of each among those of its class."""
        places = []
        for number, score in zip(numbers, scores, strict=True):
            places.append(len(self._scores[number]))
            self._scores[number].append(score)
        return places

    def _best(self, number: int) -> list[Record]:
        """The detections of a word; with ``fixed`` those among its ``MOST_FIXED`` highest scores in all images."""
        found = self._found[number]
        if len(self._scores[number]) <= MOST_FIXED:
            return found
        best = set(np.argsort(-np.array(self._scores[number]), kind="stable")[:MOST_FIXED].tolist())
        return [one for one in found if one["place"] in best]

    def _counted(self, numbers: Sequence[int], overlap: Overlap) -> NDArray[np.float64]:
        """The evaluator's table for some of the words, over images that contain one of them."""
        objects = [{**one, "category_id": number + 1} for number in numbers for one in self._objects[number]]
        found = [{**one, "category_id": number + 1} for number in numbers for one in self._best(number)]
        partly: dict[int, set[int]] = {}
        for one in (*objects, *found):
            marks = partly.setdefault(one["image_id"], set())
            if not one.pop("exhaustive"):
                marks.add(one["category_id"])
            one.pop("place", None)
            one.pop("segmentation" if overlap == "bbox" else "bbox", None)
        if not objects:
            return np.full((10, 101, len(numbers), len(SIZES)), -1.0)
        classes = [{"id": number + 1, "name": self.words[number], "frequency": "f"} for number in numbers]
        images = [self._image(one, sorted(marks), numbers) for one, marks in sorted(partly.items())]
        most = MOST_FIXED if self.fixed else MOST_FEDERATED if self.federated else MOST
        return _count(objects, found, classes, images, overlap, most)

    def _image(self, one: int, partly: list[int], numbers: Sequence[int]) -> Record:
        """One image; detections that do not count were dropped in :meth:`add`, so no remaining class is unknown."""
        height, width = self._sizes[one - 1]
        searched = [number + 1 for number in numbers]
        about = {"neg_category_ids": searched, "not_exhaustive_category_ids": partly}
        return {"id": one, "height": height, "width": width, **about}


def _count(
    objects: list[Record],
    found: list[Record],
    classes: list[Record],
    images: list[Record],
    overlap: Overlap,
    most: int,
) -> NDArray[np.float64]:
    numbered = [{"id": number, **one} for number, one in enumerate(objects, 1)]  # 0 would mean that nothing was found
    truth = COCO({"images": images, "categories": classes, "annotations": numbered})
    results = truth.loadRes(found)
    evaluator = COCOeval_faster(truth, results, overlap, lvis_style=True, print_function=logger.debug)
    evaluator.params.maxDets = [most]
    evaluator.evaluate()
    evaluator.accumulate()
    table: NDArray[np.float64] = evaluator.eval["precision"][..., 0]
    return table


def coco_runs(segmentation: Any, height: int, width: int) -> Record:
    """``segmentation`` as COCO's run lengths; polygons are filled like in COCO's own code.

    Polygons of less than three corners are empty and are left out if there are others.

    Raises:
        DataError: neither polygons nor run lengths, or another size.
    """
    if isinstance(segmentation, Mapping):
        runs: Record = rle.encode(np.asfortranarray(mask_of(segmentation, height, width)))
        return runs
    try:
        polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in segmentation]
    except (TypeError, ValueError) as error:
        raise DataError(f"a segmentation is neither polygons nor runs ({error})") from error
    polygons = [points for points in polygons if len(points) >= 3]
    if not polygons or not all(np.isfinite(points).all() for points in polygons):
        raise DataError("a segmentation has no polygon of three corners, or a corner that is not a number")
    inside = [points.clip(-1, [width + 1, height + 1]).ravel().tolist() for points in polygons]
    runs = rle.segmToRle(inside, width, height)
    return runs


def runs_of(mask: NDArray[np.bool_], top: int, left: int, height: int, width: int) -> Record:
    """COCO's run lengths of an image that has ``mask``, [h, w], at a position and zeros elsewhere."""
    counts = run_lengths_at(mask, top, left, height, width)
    runs: Record = rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return runs


def _found_runs(found: Detections, place: int, marked: Objects) -> Record:
    rows, columns, mask = found.mask_in(place, marked.height, marked.width)
    return runs_of(mask.numpy(), rows.start, columns.start, marked.height, marked.width)


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None
