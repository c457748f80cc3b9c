"""Classification by the head of a fine-tuned model."""

from dataclasses import dataclass
from typing import Any

from pipeline.config import require
from pipeline.evaluation.classes import (
    CLASSES_HELP,
    LABEL_HELP,
    Labels,
    check_views,
    label_key,
    labelled_batches,
    read_classes,
)
from pipeline.evaluation.data import Data
from pipeline.evaluation.media import medium_reader
from pipeline.evaluation.task import ACCURACY, Cache, PreparedSet, Reading, Report, Task, option
from pipeline.evaluation.zero_shot import head_of, own_head
from pipeline.shards.media import MEDIA


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    classes: str = option("auto", "classes", CLASSES_HELP)
    label: str = option("", "label", LABEL_HELP)
    clips: int = option(1)
    """Clips of a video at equal distances, 1 to 64, whose probabilities are averaged; see --zero-shot."""
    crops: int = option(1)
    """Crops of a video along its longer side, 1 or 3."""


class Classification(Task):
    """The model's own head."""

    report = Report("classification", "classification", ACCURACY)
    help = "Classification sets for the own head of a fine-tuned model; see --zero-shot."
    rank = 2
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a head."""
        advice = "none, since the model has no head: jobs/finetune.py trains one"
        require(_medium(model) is not None, "classification", one.name, advice)
        check_views(model, one, str(_medium(model)))

    def prepare(self, config: Config, data: Data, name: str) -> Labels:
        """The classes."""
        classes, label = read_classes(config.classes, data.card, name), label_key(config.label, data.card)
        return Labels(classes, (), label, clips=config.clips, crops=config.crops)

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Accuracies."""
        medium = str(_medium(model))
        batches = labelled_batches(medium_reader(model, medium, **one.ready.views), one, reading)
        return own_head(model, batches, one.ready.classes, reading.evaluation_precision, medium)


def _medium(model: object) -> str | None:
    """The medium that the model's head classifies."""
    return next((name for name in MEDIA if head_of(model, name) is not None), None)
