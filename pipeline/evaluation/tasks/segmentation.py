"""Semantic segmentation by words, in sets with masks of objects or with label maps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import require
from pipeline.dataset import Card, card_names, load_card
from pipeline.errors import SettingError
from pipeline.evaluation.classes import lines_of
from pipeline.evaluation.data import CardData, Data, SnapshotData
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.segmentation import (
    GROUND,
    IMAGES_AT_ONCE,
    SegmentationSet,
    as_segmenter,
    evaluate_segmentation,
    labelled_images,
)
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.classes import classes_of
from pipeline.loaders.label_figures import label_figure
from pipeline.loaders.segmentation import LabelClasses, LabelField
from pipeline.models.detections import check_words
from pipeline.models.segments import ImageViews
from pipeline.shards.label_values import MASK_FIELD
from pipeline.shards.objects import FIELD
from pipeline.sources.source import Classed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 6  # images of a figure
WORDS = "auto, a dataset card with classes, or a file with one word a line"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    words: str = option(
        "auto",
        "segmentation_words",
        "Words to segment by: auto (the classes of the data's card, or of the snapshot), a card, or a file of words.",
    )
    unlabelled: Literal["void", "background"] = option(
        "void", "segmentation_unlabelled", "What unlabelled pixels are: void, which is not counted, or background."
    )
    background_word: str = option(
        "", "segmentation_background", "A further word that stands for the background, such as other; none if empty."
    )
    threshold: float = option(
        0.0, "segmentation_threshold", "Probability of the best word below which a pixel is background, 0 to 1."
    )
    labels: Literal["auto", "boxes.json", "mask.png"] = option("auto")
    side: int | None = option(
        None, "segmentation_side", "Longer side to which images are resized, in pixels; none for the model's own input."
    )
    scales: str = option("1", "segmentation_scales", "Factors of the side whose results are averaged: 0.75+1+1.25.")
    flip: bool = option(False, "segmentation_flip", "Average with the mirrored image.")


class SemanticSegmentation(Task):
    """Intersection over union; ``ready`` is the set's :class:`SegmentationSet`."""

    report = Report(
        "seg",
        "segmentation",
        (
            *(Column("miou", "mIoU"), Column("miou_foreground", "without background")),
            *(Column("pixel_accuracy", "pixels"), Column("mean_accuracy", "per class"), SAMPLES),
        ),
    )
    help = "Sets with masks for a segmenter, or for the patches of a CLIP; see --zero-shot."
    rank = 4
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a segmenter or a CLIP."""
        as_segmenter(model, type(model).__name__)

    def prepare(self, config: Config, data: Data, name: str) -> SegmentationSet:
        """Words, classes and views; requires data with labels."""
        require(0 <= config.threshold <= 1, "segmentation_threshold", config.threshold, "0 to 1")
        field, known = _label_field(config, data), _known_classes(data)
        words = read_words(config.words, data.card, known, name)
        ground = config.background_word
        check_words((*words, ground) if ground else words)
        classes = LabelClasses(
            classes=(*words, ground or GROUND),
            field=field,
            unlabelled=(ground or GROUND) if config.unlabelled == "background" else "",
            mask_classes=known or words,
        )
        return SegmentationSet(words, classes, ground, config.threshold, read_views(config))

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Intersection over union, over all classes and of each."""
        return evaluate_segmentation(
            as_segmenter(model, type(model).__name__),
            one.samples(),
            one.ready,
            batch=min(reading.evaluation_batch, IMAGES_AT_ONCE),
            threads=reading.evaluation_threads,
            precision=reading.evaluation_precision,
        )

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``segmentation``: six images, their label maps, and what the model finds."""
        ready: SegmentationSet = one.ready
        segmenter, rows = as_segmenter(model, type(model).__name__), []
        for images, maps in labelled_images(one.samples(SHOWN), ready, IMAGES_AT_ONCE, threads=2):
            with inference(model):
                found = segmenter.segment(images, ready.asked, ready.views)
            rows += [
                (image, (truth, ready.predicted(some))) for image, truth, some in zip(images, maps, found, strict=True)
            ]
        named = f"{one.name} {title}".strip()
        titles = ("image", "labels", "found")
        return {"segmentation": label_figure(rows, ready.names, titles, f"{named}: labels and result", per_row=2)}


def _label_field(config: Config, data: Data) -> LabelField:
    """The field with the truth: that of the option, or ``mask.png`` where the data have it."""
    if isinstance(data, CardData):
        own: LabelField = getattr(data.source, "label_field", "boxes.json")
        return own if config.labels == "auto" else config.labels
    fields = data.snapshot.fields
    own = "mask.png" if MASK_FIELD in fields else "boxes.json"
    field = own if config.labels == "auto" else config.labels
    allowed = f"data with {FIELD} or {MASK_FIELD}; this has {', '.join(fields)}"
    require(field in fields, "segmentation", data.snapshot.folder, allowed)
    return field


def _known_classes(data: Data) -> tuple[str, ...]:
    """The classes of the data, in the order of the values of their masks."""
    named: Mapping[str, str] = {}
    if isinstance(data, SnapshotData):
        named = classes_of(data.snapshot)
    elif isinstance(data.source, Classed):
        named = data.source.classes
    return tuple(named) or (data.card.classes if data.card else ())


def read_words(setting: str, card: Card | None, known: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The words for ``setting``, for a set with this card and ``known`` classes.

    Raises:
        SettingError: none of :data:`WORDS`.
    """
    if setting in card_names():
        card, setting = load_card(setting), "auto"
        known = card.classes
    if setting == "auto":
        words = card.classes if card and card.classes else known
        if not words:
            raise SettingError("segmentation_words", setting, f"for {name}, whose data have no classes: {WORDS}")
        return tuple(words)
    return lines_of("segmentation_words", setting, WORDS)


def read_views(config: Config) -> ImageViews:
    """The views of an image.

    Raises:
        SettingError: ``scales`` are not numbers joined by a plus sign.
    """
    try:
        scales = tuple(float(part) for part in config.scales.split("+"))
    except ValueError as error:
        raise SettingError("segmentation_scales", config.scales, "numbers such as 0.75+1+1.25") from error
    return ImageViews(side=config.side, scales=scales, flip=config.flip)
