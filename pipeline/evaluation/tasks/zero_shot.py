"""Zero-shot classification: an image belongs to the class with the nearest prompts."""

from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.classes import (
    CLASSES_HELP,
    LABEL_HELP,
    Labels,
    label_key,
    labelled_batches,
    read_classes,
    read_templates,
)
from pipeline.evaluation.data import Data
from pipeline.evaluation.encoder import as_encoder
from pipeline.evaluation.task import ACCURACY, Cache, PreparedSet, Reading, Report, Task, option
from pipeline.evaluation.zero_shot import classifier, zero_shot


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    classes: str = option("auto", "classes", CLASSES_HELP)
    templates: str = option(
        "auto",
        "templates",
        "Prompts: auto (the card's), imagenet (80 prompts), imagenet-simple (7), none, or a file of templates with {}.",
    )
    label: str = option("", "label", LABEL_HELP)


class ZeroShot(Task):
    """The nearest class vector."""

    report = Report("zeroshot", "zero-shot", ACCURACY)
    help = "Zero-shot classification sets: dataset cards or snapshot folders; NAME=DATA gives a set a name of its own."
    rank = 0
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require an encoder of images and texts."""
        as_encoder(model, type(model).__name__)

    def prepare(self, config: Config, data: Data, name: str) -> Labels:
        """Classes and templates."""
        classes = read_classes(config.classes, data.card, name)
        return Labels(classes, read_templates(config.templates, data.card, name), label_key(config.label, data.card))

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Accuracies. Class vectors are computed once for all sets with these classes and templates."""
        precision, texts = reading.evaluation_precision, (one.ready.classes, one.ready.templates)
        if ("zero_shot", texts) not in cache:
            cache["zero_shot", texts] = classifier(model, *texts, precision)
        batches = labelled_batches(model.transforms(train=False), one, reading)
        return zero_shot(model, batches, cache["zero_shot", texts], precision)
