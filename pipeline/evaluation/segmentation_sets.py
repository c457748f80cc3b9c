"""A set for segmentation by words: the options that its tasks share, and what they become."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.config import require
from pipeline.dataset import Card, card_names, load_card
from pipeline.errors import SettingError
from pipeline.evaluation.background import LEARN, Background, read_thresholds
from pipeline.evaluation.classes import lines_of
from pipeline.evaluation.data import CardData, Data, SnapshotData, open_data
from pipeline.evaluation.segmentation import GROUND, IMAGES_AT_ONCE, SegmentationSet, learned_background
from pipeline.evaluation.task import Reading, option
from pipeline.loaders.classes import classes_of
from pipeline.loaders.segmentation import LabelClasses, LabelField
from pipeline.models.detections import check_words
from pipeline.models.segments import ImageViews, Segmenter
from pipeline.shards.label_values import MASK_FIELD
from pipeline.shards.objects import FIELD
from pipeline.sources.source import Classed

WORDS = "auto, a dataset card with classes, or a file with one word a line"


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """Words, labels, background and views."""

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
    threshold: float | str = option(
        0.0,
        "segmentation_threshold",
        "Probability of the best word below which a pixel is background: a number from 0 to 1, a JSON file "
        "{word: number}, or learn:DATA for the best ones on another labelled set.",
    )
    relative_threshold: bool = option(
        False, "segmentation_relative_threshold", "Lower an image's thresholds to the largest probability in it."
    )
    labels: Literal["auto", "boxes.json", "mask.png"] = option("auto")
    label_key: str = option(
        "label", "segmentation_label_key", "Key of an object in boxes.json that has its class, such as supercategory."
    )
    side: int | None = option(
        None, "segmentation_side", "Longer side to which images are resized, in pixels; none for the model's own input."
    )
    scales: str = option("1", "segmentation_scales", "Factors of the side whose results are averaged: 0.75+1+1.25.")
    flip: bool = option(False, "segmentation_flip", "Average with the mirrored image.")


@dataclass(frozen=True)
class WordSet:
    """A set and, where its thresholds are learned, the data for them with their own set."""

    one: SegmentationSet
    learn: tuple[Data, SegmentationSet] | None = None
    learned: list[Background] = field(default_factory=list)  # by the last evaluation, for its figures

    @property
    def last(self) -> SegmentationSet:
        """The set with the thresholds of the last evaluation."""
        return replace(self.one, background=self.learned[0]) if self.learned else self.one

    def for_model(self, segmenter: Segmenter, reading: Reading) -> SegmentationSet:
        """The set with the thresholds for a model, which are learned now if they must be."""
        if self.learn is not None:
            data, labelled = self.learn
            self.learned[:] = [learned_background(segmenter, data.samples(None), labelled, **reading_of(reading))]
        return self.last


def reading_of(reading: Reading) -> dict[str, Any]:
    """The arguments of evaluations of images in their stored size."""
    return {
        "batch": min(reading.evaluation_batch, IMAGES_AT_ONCE),
        "threads": reading.evaluation_threads,
        "precision": reading.evaluation_precision,
    }


def learns(config: SetOptions) -> bool:
    """Whether thresholds are learned."""
    return isinstance(config.threshold, str) and config.threshold.startswith(LEARN)


def read_word_set(config: SetOptions, data: Data, name: str) -> WordSet:
    """The set for ``config``, with the data from which its thresholds are learned.

    Raises:
        SettingError: invalid options, or data without labels.
    """
    if not learns(config):
        return WordSet(read_set(config, data, name))
    one = read_set(replace(config, threshold=0.0), data, name)
    return WordSet(one, _read_learn(config, data, one, name))


def read_set(config: SetOptions, data: Data, name: str) -> SegmentationSet:
    """Words, classes, thresholds and views of a set."""
    field, known = _label_field(config, data), _known_classes(data)
    words = read_words(config.words, data.card, known, name)
    ground = config.background_word
    check_words((*words, ground) if ground else words)
    classes = LabelClasses(
        classes=(*words, ground or GROUND),
        field=field,
        unlabelled=(ground or GROUND) if config.unlabelled == "background" else "",
        mask_classes=known or words,
        label_key=config.label_key,
    )
    thresholds = read_thresholds(config.threshold, words, "segmentation_threshold", rest=1 if ground else 0)
    background = Background(thresholds, config.relative_threshold)
    return SegmentationSet(words, classes, ground, background, read_views(config))


def _read_learn(config: SetOptions, data: Data, one: SegmentationSet, name: str) -> tuple[Data, SegmentationSet]:
    """The data from which thresholds are learned, with the same words.

    Raises:
        SettingError: the evaluated data themselves, or a set without background.
    """
    place = str(config.threshold).removeprefix(LEARN)
    allowed = "background with learned thresholds, which need pixels that are none of the words"
    require(config.unlabelled == "background", "segmentation_unlabelled", config.unlabelled, allowed)
    other = open_data(place)
    allowed = f"learn:DATA with data other than those of {name}, which would be measured by thresholds made for them"
    require(_source_of(other) != _source_of(data), "segmentation_threshold", config.threshold, allowed)
    return other, replace(
        one,
        classes=replace(
            one.classes, field=_label_field(config, other), mask_classes=_known_classes(other) or one.words
        ),
    )


def _source_of(data: Data) -> object:
    return data.source if isinstance(data, CardData) else (data.snapshot.uri, data.snapshot.id)


def _label_field(config: SetOptions, data: Data) -> LabelField:
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


def read_views(config: SetOptions) -> ImageViews:
    """The views of an image.

    Raises:
        SettingError: ``scales`` are not numbers joined by a plus sign.
    """
    try:
        scales = tuple(float(part) for part in config.scales.split("+"))
    except ValueError as error:
        raise SettingError("segmentation_scales", config.scales, "numbers such as 0.75+1+1.25") from error
    return ImageViews(side=config.side, scales=scales, flip=config.flip)
