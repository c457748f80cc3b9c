"""Open-vocabulary detection: the vocabulary of a set, and its evaluation.

Words are base (the detector was trained on their boxes) or novel. All words compete, and the AP of each group is the
mean over its classes: generalised zero-shot detection (Bansal et al. 2018, arXiv 1804.04340), with 48 base and 17 novel
classes of COCO; in LVIS the rare classes are novel (Gu et al. 2021, arXiv 2104.13921, section 4.1).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.evaluation.average_precision import AveragePrecision
from pipeline.evaluation.data import evaluation_batches
from pipeline.evaluation.encoder import inference
from pipeline.loaders.readers import ImageReader, ObjectsReader
from pipeline.models.detections import Detector, check_words
from pipeline.shards.objects import Objects, overlaps, plain_word
from pipeline.shards.sample import Sample
from pipeline.sources.coco_annotations import class_word

IMAGES_AT_ONCE = 8
BUDGETS = (100, 300, 1000)
THRESHOLDS = np.linspace(0.5, 0.95, 10)
FREQUENCIES = ("r", "c", "f")
GROUPS, BASE = ("base", "novel", *FREQUENCIES), ("base", "c", "f")


@dataclass(frozen=True)
class Vocabulary:
    """The words to detect; ``groups`` of them (base, novel; r, c, f) get metrics of their own."""

    words: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_words(self.words)
        for words in self.groups.values():
            check_words(self.words, words)

    @property
    def base(self) -> tuple[str, ...] | None:
        """The words that a detector was trained on; ``None`` if unknown."""
        return self.groups.get("base")


def open_vocabulary(base: Sequence[str], novel: Sequence[str]) -> Vocabulary:
    """Base and novel words.

    Raises:
        SettingError: no words, duplicates, or a word that is both base and novel, compared without case.
    """
    groups = {"base": tuple(base), "novel": tuple(novel)}
    return Vocabulary((*base, *novel), {name: words for name, words in groups.items() if words})


def published_vocabulary(record: Mapping[str, Any], place: str) -> Vocabulary:
    """The classes of an annotation file of COCO or LVIS; in files with class frequencies, rare classes are novel.

    Raises:
        SettingError: no list of ``categories`` with names.
    """
    try:
        names = [class_word(category) for category in record["categories"]]
        frequencies = [category.get("frequency") for category in record["categories"]]
    except (KeyError, TypeError, AttributeError) as error:
        allowed = f"an annotation file with `categories`, each with a name ({error!r})"
        raise SettingError("detection_words", place, allowed) from error
    check_words(names)
    if not set(frequencies) <= set(FREQUENCIES):
        return Vocabulary(tuple(names))
    return grouped_vocabulary(dict(zip(names, frequencies, strict=True)))


def grouped_vocabulary(classes: Mapping[str, str]) -> Vocabulary:
    """Names with their group, as in ``loaders/classes.py``: r (novel), c and f, or base and novel."""
    having = {one: tuple(name for name, group in classes.items() if group == one) for one in GROUPS}
    having["novel"] += having["r"]
    having["base"] = tuple(name for name, group in classes.items() if group in BASE)
    return Vocabulary(tuple(classes), {name: words for name, words in having.items() if words})


@runtime_checkable
class Proposer(Protocol):
    """A method that proposes regions of objects of any class."""

    def propose(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For uint8 images [3, H, W]: boxes float32 [n, 4], x1, y1, x2, y2 in pixels, and scores [n], best first."""
        ...


def evaluate_detection(
    method: Detector,
    samples: Iterable[Sample],
    vocabulary: Vocabulary,
    *,
    batch: int = IMAGES_AT_ONCE,
    threads: int = 4,
    precision: str = "fp32",
    fixed: bool = False,
) -> dict[str, float]:
    """Detect all words in all images; ``fixed`` computes fixed AP.

    Returns:
        The metrics of :meth:`~pipeline.evaluation.average_precision.AveragePrecision.metrics`; ``ar100``, ``ar300``,
        ``ar1000`` and ``ar300_<group>`` if the method proposes boxes; ``samples``. All but the last are 0 to 1.

    Raises:
        DataError: a sample without ``boxes.json`` or with boxes for another image size; no label is a word.
    """
    found = AveragePrecision(vocabulary.words, vocabulary.groups, fixed=fixed)
    recall = ProposalRecall(vocabulary)
    for images, marked in batches_of(samples, batch, threads):
        with inference(method, precision):
            detections = method.predict(images, vocabulary.words, vocabulary.base)
            proposed = method.propose(images) if isinstance(method, Proposer) else []
        for objects, some in zip(marked, detections, strict=True):
            found.add(objects, some)
        for objects, (boxes, _) in zip(marked, proposed, strict=bool(proposed)):
            recall.add(objects, boxes.double().cpu().numpy())
    return {**found.metrics(), **recall.metrics(), "samples": float(found.images)}


def batches_of(samples: Iterable[Sample], batch: int, threads: int) -> Iterator[tuple[list[Tensor], list[Objects]]]:
    """Images, uint8 [3, H, W] in their stored size, and their annotated objects; unreadable samples are left out."""

    for rows in evaluation_batches(samples, (ImageReader(transform=None), ObjectsReader()), batch, threads):
        for image, objects, key in zip(rows["image"], rows["objects"], rows["key"], strict=True):
            objects.check_size(image.shape[1], image.shape[2], key)
        yield rows["image"], rows["objects"]


class ProposalRecall:
    """The recall of the first 100, 300 and 1000 proposals of an image, for objects of any class.

    The mean over overlaps of 0.5, 0.55, ... 0.95. Proposals are matched in order, each to the unmatched object with the
    largest overlap, as in COCO's evaluator without classes. Crowds, and labels outside of the words, are left out.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._groups = {name: {plain_word(word) for word in words} for name, words in vocabulary.groups.items()}
        self._groups[""] = {plain_word(word) for word in vocabulary.words}
        self._ranks: dict[str, list[NDArray[np.int64]]] = {name: [] for name in self._groups}

    def add(self, marked: Objects, proposals: NDArray[np.float64]) -> None:
        """Add one image: its objects, and the proposed boxes x1, y1, x2, y2, float64 [n, 4], sorted by score."""
        labels = [plain_word(label) for label in marked.labels]
        for group, words in self._groups.items():
            counted = [n for n, label in enumerate(labels) if label in words and not marked.crowd[n]]
            self._ranks[group].append(finding_ranks(proposals[: max(BUDGETS)], marked.boxes[counted]))

    def metrics(self) -> dict[str, float]:
        """``ar100``, ``ar300``, ``ar1000`` and ``ar300_<group>``; empty without any image or object."""
        found = {}
        for group, ranks in self._ranks.items():
            together = np.concatenate([np.empty((len(THRESHOLDS), 0), np.int64), *ranks], axis=1)
            for budget in BUDGETS if not group else (300,):
                if together.size:
                    found[f"ar{budget}" + (f"_{group}" if group else "")] = float((together < budget).mean())
        return found


def finding_ranks(proposals: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """The index of the proposal that matches each box, int64 [10 thresholds, boxes]; 2**62 for unmatched boxes."""
    ranks = np.full((len(THRESHOLDS), len(boxes)), 2**62, np.int64)
    if not len(proposals) or not len(boxes):
        return ranks
    overlap = overlaps(proposals, boxes)
    rows = np.arange(len(THRESHOLDS))
    for place in np.flatnonzero(overlap.max(axis=1) >= THRESHOLDS[0]):
        free = np.where(ranks == 2**62, overlap[place], -1)
        best = len(boxes) - 1 - free[:, ::-1].argmax(axis=1)  # at ties the last, as in COCO's evaluator
        taking = rows[free[rows, best] >= THRESHOLDS]
        ranks[taking, best[taking]] = place
    return ranks


def as_detector(method: object, address: str) -> Detector:
    """``method``, if it has ``predict``; else raises ``SettingError``."""
    has = callable(getattr(method, "predict", None))
    require(has, "checkpoint", address, "a detector (a method with `predict`)")
    return cast(Detector, method)
