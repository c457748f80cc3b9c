"""Semantic segmentation by words, in sets with masks of objects or with label maps."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import require
from pipeline.dataset import load_card
from pipeline.evaluation.data import Data, SnapshotData
from pipeline.evaluation.held_out import HeldOut, evaluate_held_out
from pipeline.evaluation.pixel_counts import CountedPart, by_word
from pipeline.evaluation.segmentation import WHOLE, as_segmenter, evaluate_segmentation, segmentation_figure
from pipeline.evaluation.segmentation_sets import (
    SetOptions,
    WordSet,
    learns,
    read_set,
    read_word_set,
    reading_of,
)
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.classes import NOVEL, classes_of
from pipeline.models.towers.weights import digest_of
from pipeline.shards.objects import plain_word

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 6  # images of a figure


@dataclass(frozen=True, kw_only=True)
class Config(SetOptions):
    """The options of a set."""

    held_out: str = option(
        "",
        "segmentation_held_out",
        "Classes that are each segmented against all else, as in few-shot papers: novel (of the data's card), all, or "
        "a card with novel classes, such as pascal_5i_fold0; all words together if empty.",
    )
    episodes: int = option(0)  # sampled pairs of a held-out class and an image; 0 counts every pair
    part: str = option("1/1")  # 2/4: every fourth image from the second on
    counts: str = option("")  # folder of the counts of all parts


@dataclass(frozen=True)
class PreparedSegmentation:
    """A set of words or of held-out classes, and the part of its images that is evaluated."""

    words: WordSet
    held_out: HeldOut | None = None
    part: CountedPart = WHOLE


class SemanticSegmentation(Task):
    """Intersection over union; ``ready`` is a :class:`PreparedSegmentation`."""

    report = Report(
        "seg",
        "segmentation",
        (
            *(Column("miou", "mIoU"), Column("miou_foreground", "without background"), Column("fb_iou", "FB-IoU")),
            *(Column("pixel_accuracy", "pixels"), Column("mean_accuracy", "per class")),
            *(Column("pairs", format=",.0f"), SAMPLES),
        ),
    )
    help = "Sets with masks for a segmenter, or for the patches of a CLIP; see --zero-shot."
    rank = 4
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a segmenter or a CLIP."""
        as_segmenter(model, type(model).__name__)

    def prepare(self, config: Config, data: Data, name: str) -> PreparedSegmentation:
        """Words, classes, thresholds and views; requires data with labels."""
        part = CountedPart.parse(config.part, config.counts)
        held_out = read_held_out(config, data, name)
        if held_out is not None:
            require(part.count == 1, "part", config.part, "1/1 with held_out")
            return PreparedSegmentation(WordSet(held_out.one), held_out)
        return PreparedSegmentation(read_word_set(config, data, name), part=part)

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Intersection over union, over all classes and of each; learned thresholds as ``threshold/<word>``."""
        ready: PreparedSegmentation = one.ready
        segmenter = as_segmenter(model, type(model).__name__)
        if ready.held_out is not None:
            return evaluate_held_out(segmenter, one.samples(), ready.held_out, **reading_of(reading))
        asked = ready.words.for_model(segmenter, reading)
        identity = digest_of(model) if ready.part.count > 1 else ""
        measured = evaluate_segmentation(
            segmenter, one.samples(), asked, part=ready.part, identity=identity, **reading_of(reading)
        )
        if ready.words.learn is None:
            return measured
        return measured | by_word("threshold", asked.words, np.array(asked.background.thresholds[: len(asked.words)]))

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``segmentation``: six images, their label maps, what the model finds, and its groups if it has any."""
        ready: PreparedSegmentation = one.ready
        segmenter = as_segmenter(model, type(model).__name__)
        title = f"{one.name} {title}".strip() + ": labels and result"
        return {"segmentation": segmentation_figure(segmenter, one.samples(SHOWN), ready.words.last, title)}


def read_held_out(config: Config, data: Data, name: str) -> HeldOut | None:
    """The set of held-out classes for ``config``; none without the option.

    Raises:
        SettingError: no such classes, or options that do not go with it.
    """
    require(config.episodes >= 0, "episodes", config.episodes, "0 or more")
    if not config.held_out:
        require(not config.episodes, "episodes", config.episodes, "0 without held_out")
        return None
    require(not learns(config), "segmentation_threshold", config.threshold, "a number or a file with held_out")
    one = read_set(replace(config, unlabelled="background"), data, name)
    wanted = _held_out_names(config.held_out, data, one.words)
    places = {plain_word(word): number for number, word in enumerate(one.words)}
    missing = [word for word in wanted if plain_word(word) not in places]
    allowed = f"classes among the set's words; not {', '.join(missing[:5])}"
    require(not missing, "segmentation_held_out", config.held_out, allowed)
    return HeldOut(one, tuple(places[plain_word(word)] for word in wanted), config.episodes)


def _held_out_names(setting: str, data: Data, words: tuple[str, ...]) -> tuple[str, ...]:
    if setting == "all":
        return words
    novel: tuple[str, ...] = ()
    if setting != "novel":
        novel = load_card(setting).novel
    elif isinstance(data, SnapshotData):
        novel = tuple(name for name, group in classes_of(data.snapshot).items() if group in NOVEL)
    novel = novel or (data.card.novel if data.card and setting == "novel" else ())
    require(bool(novel), "segmentation_held_out", setting, "all, or a card or data with novel classes")
    return novel
