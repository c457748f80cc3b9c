"""Tagging: samples with several classes each, as AudioSet's; every class ranks all samples.

A model with a head of its own for tags (``tag_audio``) is scored by that, any other one by prompts.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.config import require
from pipeline.evaluation.classes import CLASSES_HELP, read_classes, read_templates
from pipeline.evaluation.data import Data, evaluation_batches
from pipeline.evaluation.media import AUTO, check_medium, medium_of_set, medium_reader, require_text
from pipeline.evaluation.tagging import LabelsReader, by_head, by_prompts, tagging
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.evaluation.zero_shot import classifier


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    classes: str = option("auto", "tagging_classes", CLASSES_HELP)
    templates: str = option("auto")
    """Prompts, as of --zero-shot."""
    labels: str = option("labels")
    """Key of the samples' json that holds the list of classes."""
    separator: str = option(";")
    """Separator of the classes where they are a text."""
    medium: str = option(AUTO)
    """Medium to tag: auto (the first one that the model encodes and the data have), image, audio."""

    def __post_init__(self) -> None:
        check_medium(self.medium)
        require(bool(self.separator), "separator", self.separator, "one character or more")


@dataclass(frozen=True)
class Tags:
    """A set's requirements."""

    reader: LabelsReader
    templates: tuple[str, ...]
    medium: str


class Tagging(Task):
    """Mean average precision over the classes."""

    report = Report(
        "tagging",
        "tagging",
        (Column("map", "mAP"), Column("mauc", "mean AUC"), Column("chance"), Column("classes", format=",.0f"), SAMPLES),
    )
    help = "Sets whose samples have several classes each, such as AudioSet; see --zero-shot."
    rank = 3
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require an encoder of texts and of the set's medium."""
        medium = medium_of_set(model, one, one.ready.medium)
        if has_head(model, medium):
            by_head(model, medium, one.ready.reader.classes)
        else:
            require_text(model)

    def prepare(self, config: Config, data: Data, name: str) -> Tags:
        """Classes and templates."""
        reader = LabelsReader(
            classes=read_classes(config.classes, data.card, name),
            json_key=config.labels,
            separator=config.separator,
        )
        return Tags(reader, read_templates(config.templates, data.card, name), config.medium)

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Average precisions."""
        precision, medium = reading.evaluation_precision, medium_of_set(model, one, one.ready.medium)
        classes = one.ready.reader.classes
        if has_head(model, medium):
            score = by_head(model, medium, classes)
        else:
            score = by_prompts(model, medium, classifier(model, classes, one.ready.templates, precision))
        readers = (medium_reader(model, medium), one.ready.reader)
        batches = evaluation_batches(
            one.samples(readers=readers), readers, reading.evaluation_batch, reading.evaluation_threads
        )
        return tagging(model, batches, score, precision)


def has_head(model: object, medium: str) -> bool:
    """Whether the model tags this medium by a head of its own."""
    return callable(getattr(model, f"tag_{medium}", None)) and bool(getattr(model, "classes", ()))
