"""Classification by the head of a fine-tuned model."""

from dataclasses import dataclass
from typing import Any

from pipeline.config import require
from pipeline.evaluation.classes import CLASSES_HELP, LABEL_HELP, Labels, label_key, labelled_batches, read_classes
from pipeline.evaluation.data import Data
from pipeline.evaluation.encoder import as_encoder
from pipeline.evaluation.media import medium_reader
from pipeline.evaluation.task import ACCURACY, Cache, PreparedSet, Reading, Report, Task, option
from pipeline.evaluation.zero_shot import own_head


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    classes: str = option("auto", "classes", CLASSES_HELP)
    label: str = option("", "label", LABEL_HELP)


class Classification(Task):
    """The model's own head."""

    report = Report("classification", "classification", ACCURACY)
    help = "Classification sets for the own head of a fine-tuned model; see --zero-shot."
    rank = 2
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require an encoder with a head."""
        as_encoder(model, type(model).__name__)
        has = callable(getattr(model, "classify", None))
        require(has, "classification", one.name, "none, since the model has no head: jobs/finetune.py trains one")

    def prepare(self, config: Config, data: Data, name: str) -> Labels:
        """The classes."""
        return Labels(read_classes(config.classes, data.card, name), (), label_key(config.label, data.card))

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Accuracies."""
        batches = labelled_batches(medium_reader(model, "image"), one, reading)
        return own_head(model, batches, one.ready.classes, reading.evaluation_precision)
