"""Evaluation of grounding: recall of a caption's phrases, and accuracy of referring expressions.

Phrases, as in Flickr30k Entities (Plummer et al. 2015, arXiv 1505.04870), by the any-box rule of MDETR's evaluator
(Kamath et al. 2021, arXiv 2104.12763): a phrase is found at k if one of its k best boxes overlaps any of its annotated
boxes by 0.5 or more. With ``merged`` it has one box, the smallest around all of them. Phrases without annotated boxes
do not count. R@k is the mean over the phrases of all captions, and over those of each kind.

Referring expressions, as in RefCOCO (Yu et al. 2016, arXiv 1608.00272): an expression names one object. It is right if
its best box overlaps the object's box by 0.5 or more. Masks are compared by their mean intersection over union, and by
the intersections of all expressions over the unions of all (cumulative).
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.evaluation.average_precision import coco_runs
from pipeline.evaluation.detection import IMAGES_AT_ONCE, batches_of
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.pixel_counts import by_word
from pipeline.models.detections import GroundedBoxes, Grounder
from pipeline.shards.objects import Objects, overlaps
from pipeline.shards.sample import Sample

logger = logging.getLogger(__name__)

RANKS = (1, 5, 10)
HALF = 0.5
NEVER = 2**62


@dataclass(frozen=True)
class AskedPhrase:
    """``caption[start:end]`` in code points, the numbers of its objects, and its kinds."""

    start: int
    end: int
    objects: tuple[int, ...]
    kinds: tuple[str, ...] = ()

    @property
    def span(self) -> tuple[int, int]:
        """Start and end."""
        return self.start, self.end


Ask = Callable[[Objects], tuple[AskedPhrase, ...]]


def annotated_phrases(objects: Objects) -> tuple[AskedPhrase, ...]:
    """The phrases of the caption with at least one annotated object; crowds are left out."""
    named = [(one, _single(objects, one.objects)) for one in objects.phrases]
    return tuple(AskedPhrase(one.start, one.end, numbers, one.kinds) for one, numbers in named if numbers)


def referring_phrases(objects: Objects) -> tuple[AskedPhrase, ...]:
    """The phrases that name exactly one object."""
    alone = [one for one in annotated_phrases(objects) if len(one.objects) == 1]
    crowds = {(one.start, one.end) for one in objects.phrases if any(objects.crowd[n] for n in one.objects)}
    return tuple(one for one in alone if one.span not in crowds)


def referring_captions(objects: Objects) -> tuple[AskedPhrase, ...]:
    """The whole caption, if its phrases together name exactly one object: RefCOCO's expressions."""
    named = {number for one in annotated_phrases(objects) for number in one.objects}
    return (AskedPhrase(0, len(objects.caption), tuple(named)),) if len(named) == 1 else ()


def _single(objects: Objects, numbers: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(number for number in numbers if not objects.crowd[number]))


@dataclass(frozen=True)
class LocatedPhrases:
    """An image uint8 [3, H, W] with its annotated objects, the phrases that were asked for, and their boxes."""

    image: Tensor
    objects: Objects
    asked: tuple[AskedPhrase, ...]
    found: GroundedBoxes

    def boxes_of(self, number: int) -> NDArray[np.float64]:
        """The boxes of a phrase, float64 [n, 4], sorted by score."""
        boxes: NDArray[np.float64] = self.found.boxes[self.found.spans == number].double().numpy()
        return boxes

    def best(self, number: int) -> int | None:
        """The place of the phrase's best box in ``found``."""
        places = (self.found.spans == number).nonzero()
        return int(places[0]) if len(places) else None


def locate(
    method: Grounder,
    samples: Iterable[Sample],
    ask: Ask,
    *,
    batch: int = IMAGES_AT_ONCE,
    threads: int = 4,
    precision: str = "fp32",
) -> Iterator[LocatedPhrases]:
    """Ground the phrases that ``ask`` gives, in all samples that have some.

    Raises:
        DataError: a sample without ``boxes.json`` or with boxes for another image size; no phrase in all samples.
    """
    nothing, seen = True, 0
    for images, marked in batches_of(samples, batch, threads):
        rows = [(image, one, asked) for image, one in zip(images, marked, strict=True) if (asked := ask(one))]
        seen += len(images)
        if not rows:
            continue
        nothing = False
        spans = [[one.span for one in asked] for _, _, asked in rows]
        with inference(method, precision):
            found = method.ground([image for image, _, _ in rows], [one.caption for _, one, _ in rows], spans)
        for (image, one, asked), boxes in zip(rows, found, strict=True):
            yield LocatedPhrases(image, one, asked, boxes)
    if nothing:
        raise DataError(f"none of {seen} samples has a phrase with annotated objects")


@dataclass
class PhraseRecall:
    """Collects the rank of the first box that hits each phrase."""

    merged: bool = False
    ranks: list[int] = field(default_factory=list)
    kinds: list[tuple[str, ...]] = field(default_factory=list)
    without_box: int = 0
    images: int = 0

    def add(self, located: LocatedPhrases) -> None:
        """Add the phrases of one caption."""
        self.images += 1
        for number, phrase in enumerate(located.asked):
            boxes = located.boxes_of(number)
            self.ranks.append(hit_rank(boxes, self._truth(located.objects, phrase)))
            self.kinds.append(phrase.kinds)
            self.without_box += not len(boxes)

    def metrics(self) -> dict[str, float]:
        """``r1``, ``r5``, ``r10``, ``r_all`` (any of all boxes), 0 to 1; ``r1/<kind>``, ... where kinds are known;
        ``no_box``, the share of phrases without a box; ``phrases``, ``samples``."""
        ranks = np.array(self.ranks, np.int64)
        found = {f"r{k}": float((ranks < k).mean()) for k in RANKS} | {"r_all": float((ranks < NEVER).mean())}
        names = sorted({kind for kinds in self.kinds for kind in kinds})
        inside = {name: np.array([name in kinds for kinds in self.kinds]) for name in names}
        for k in RANKS:
            found |= by_word(f"r{k}", names, np.array([(ranks[inside[name]] < k).mean() for name in names]))
        totals = {"phrases": float(len(ranks)), "samples": float(self.images)}
        return {**found, "no_box": self.without_box / len(ranks), **totals}

    def _truth(self, objects: Objects, phrase: AskedPhrase) -> NDArray[np.float64]:
        boxes: NDArray[np.float64] = objects.boxes[list(phrase.objects)]
        if not self.merged:
            return boxes
        return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])[None]


def hit_rank(boxes: NDArray[np.float64], truth: NDArray[np.float64]) -> int:
    """The place of the first of ``boxes`` [n, 4] with an overlap of 0.5 or more with one of ``truth`` [m, 4]; 2**62 if
    there is none."""
    hits = np.flatnonzero((overlaps(boxes, truth) >= HALF).any(axis=1))
    return int(hits[0]) if len(hits) else NEVER


@dataclass
class ReferringAccuracy:
    """Collects the best box of each expression and, if the method gives masks, its mask."""

    ranks: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    with_masks: bool = True
    images: int = 0

    def add(self, located: LocatedPhrases) -> None:
        """Add the expressions of one image.

        Raises:
            DataError: an invalid segmentation.
        """
        self.images += 1
        self.with_masks &= located.found.masks is not None
        for number, phrase in enumerate(located.asked):
            (wanted,) = phrase.objects
            self.ranks.append(hit_rank(located.boxes_of(number), located.objects.boxes[[wanted]]))
            if self.with_masks:
                self._add_masks(located, number, wanted)

    def _add_masks(self, located: LocatedPhrases, number: int, wanted: int) -> None:
        objects = located.objects
        if objects.segmentations[wanted] is None:
            bare = f"object {wanted} ({objects.labels[wanted]}) of sample {objects.key} has no segmentation"
            logger.warning("%s: the masks of referring expressions are not compared, boxes are", bare)
            self.with_masks = False
            return
        try:
            runs = coco_runs(objects.segmentations[wanted], objects.height, objects.width)
        except DataError as error:
            raise DataError(f"object {wanted} of sample {objects.key}: {error}") from error
        truth = rle.decode(runs).astype(bool)
        mask = np.zeros(truth.shape, bool)
        place = located.best(number)
        if place is not None:
            rows, columns, part = located.found.mask_in(place, *truth.shape)
            mask[rows, columns] = part.numpy()
        self.shared.append(int((mask & truth).sum()))
        self.together.append(int((mask | truth).sum()))

    def metrics(self) -> dict[str, float]:
        """``accuracy``; ``r5``, ``r10``: one of the best boxes is right; ``mask_miou`` and ``mask_ciou`` if all masks
        are known; ``expressions``, ``samples``. All but the last two are 0 to 1."""
        ranks = np.array(self.ranks, np.int64)
        found = {"accuracy" if k == 1 else f"r{k}": float((ranks < k).mean()) for k in RANKS}
        if self.with_masks:
            shared, together = np.array(self.shared), np.array(self.together)
            found["mask_miou"] = float((shared / np.maximum(together, 1)).mean())
            found["mask_ciou"] = float(shared.sum() / max(together.sum(), 1))
        return {**found, "expressions": float(len(ranks)), "samples": float(self.images)}


def as_grounder(method: Any, address: str) -> Grounder:
    """``method``, if it has ``ground``; else raises ``SettingError``."""
    has = callable(getattr(method, "ground", None))
    require(has, "checkpoint", address, "a method that grounds phrases (with `ground`)")
    return cast(Grounder, method)
