"""Open-vocabulary detection, in sets with boxes (and masks)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.config import require
from pipeline.dataset import Card, card_names, load_card
from pipeline.errors import SettingError
from pipeline.evaluation.classes import json_of, lines_of
from pipeline.evaluation.data import Data, SnapshotData
from pipeline.evaluation.detection import (
    IMAGES_AT_ONCE,
    Vocabulary,
    as_detector,
    batches_of,
    evaluate_detection,
    grouped_vocabulary,
    open_vocabulary,
    published_vocabulary,
)
from pipeline.evaluation.drawing import draw_detections, draw_marked
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.figures import image_grid
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.classes import classes_of
from pipeline.shards.objects import FIELD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS, FEWEST = 8, 5  # images of a figure; minimum number of drawn detections
WORDS = "auto, a dataset card, an annotation file of COCO or LVIS, or a file with one word a line"
MEASURED = (
    *("ap", "ap50", "ap75", "ap_base", "ap50_base", "ap_novel", "ap50_novel", "ap_r", "ap_c", "ap_f"),
    *("mask_ap", "mask_ap_base", "mask_ap_novel", "mask_ap_r", "mask_ap_c", "mask_ap_f"),
    *("ar100", "ar300", "ar1000"),
)


def _column(name: str) -> Column:
    return Column(name, name.replace("ap", "AP").replace("ar", "AR").replace("_", " "))


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    words: str = option(
        "auto",
        "detection_words",
        "Words to detect: auto (the classes of the data's card, or of the snapshot), a card, COCO's or LVIS's "
        "annotation JSON, or a file of words.",
    )
    fixed: bool = option(
        False,
        "detection_fixed_ap",
        "Compute fixed AP: the 10,000 best detections of each class over the data set, without a limit per image.",
    )


@dataclass(frozen=True)
class DetectionSet:
    """The words of a set, and whether fixed AP is computed."""

    vocabulary: Vocabulary
    fixed: bool = False


class Detection(Task):
    """Average precision; ``ready`` is a :class:`DetectionSet`."""

    report = Report("det", "detection", (*map(_column, MEASURED), SAMPLES))
    help = "Detection sets with boxes (and masks) for a detector; see --zero-shot."
    rank = 3
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a detector."""
        as_detector(model, type(model).__name__)

    def prepare(self, config: Config, data: Data, name: str) -> DetectionSet:
        """The words; requires data with boxes."""
        return DetectionSet(self._vocabulary(config, data, name), config.fixed)

    @staticmethod
    def _vocabulary(config: Config, data: Data, name: str) -> Vocabulary:
        named: dict[str, str] = {}
        if isinstance(data, SnapshotData):
            fields, place = data.snapshot.fields, data.snapshot.folder
            require(FIELD in fields, "detection", place, f"data with boxes, {FIELD}; this has {', '.join(fields)}")
            named = dict(classes_of(data.snapshot))
        if config.words == "auto" and named and not (data.card and data.card.classes):
            return grouped_vocabulary(named)
        return read_vocabulary(config.words, data.card, name)

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Average precision, over all classes and by groups."""
        return evaluate_detection(
            model,
            one.samples(),
            one.ready.vocabulary,
            batch=min(reading.evaluation_batch, IMAGES_AT_ONCE),
            threads=reading.evaluation_threads,
            precision=reading.evaluation_precision,
            fixed=one.ready.fixed,
        )

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``detections``: eight images, each with its annotated objects (left) and the best detections (right)."""
        pairs: list[Tensor] = []
        vocabulary: Vocabulary = one.ready.vocabulary
        words = vocabulary.words
        for images, marked in batches_of(one.samples(PAIRS), PAIRS, threads=2):
            with inference(model):
                found = model.predict(images, words, vocabulary.base)
            for image, objects, some in zip(images, marked, found, strict=True):
                known = draw_marked(image, objects, words)
                pairs += [known, draw_detections(image, some, words, most=max(FEWEST, 2 * len(objects)))]
        named = f"{one.name} {title}".strip()
        captions = ["marked", "found, with the scores"] * (len(pairs) // 2)
        grid = image_grid(pairs, captions, columns=4, title=f"{named}: what is marked and what is found")
        return {"detections": grid}


def read_vocabulary(setting: str, card: Card | None, name: str) -> Vocabulary:
    """The vocabulary for ``setting``, for a detection set with this card and name.

    Raises:
        SettingError: none of :data:`WORDS`, a duplicate word, or a word that is both base and novel.
    """
    if setting in card_names():
        card, setting = load_card(setting), "auto"
    if setting == "auto":
        if card is None or not card.classes:
            raise SettingError(
                "detection_words", setting, f"something else for {name}, whose card has no classes: {WORDS}"
            )
        return card_vocabulary(card)
    if setting.endswith(".json"):
        record = json_of("detection_words", setting, WORDS)
        if isinstance(record, dict):
            return published_vocabulary(record, setting)
    return Vocabulary(lines_of("detection_words", setting, WORDS))


def card_vocabulary(card: Card) -> Vocabulary:
    """The classes of ``card``: novel ones, and the others as base; without novel classes there are no base classes."""
    base = [word for word in card.classes if word not in card.novel]
    return open_vocabulary(base, card.novel) if card.novel else Vocabulary(card.classes)
