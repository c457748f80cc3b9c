"""How much of a segmentation's error is grouping and how much is naming, for methods that group pixels."""

from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.data import Data
from pipeline.evaluation.grouping import as_grouper, evaluate_grouping
from pipeline.evaluation.segmentation_sets import SetOptions, WordSet, read_word_set, reading_of
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task

STAGES = 3  # stages with a column of their own in a report


@dataclass(frozen=True, kw_only=True)
class Config(SetOptions):
    """The options of a set: those of a segmentation."""


class GroupingAnalysis(Task):
    """The oracle's intersection over union; ``ready`` is a :class:`WordSet`."""

    report = Report(
        "group",
        "grouping",
        (
            *(Column("miou", "mIoU"), Column("oracle_miou", "oracle"), Column("naming_error", "naming error")),
            *(Column("grouping_error", "grouping error"), Column("mask_miou", "masks")),
            *(Column(f"oracle_miou_stage{number}", f"oracle {number}") for number in range(1, STAGES + 1)),
            SAMPLES,
        ),
    )
    help = "Sets with masks for a method that groups pixels: naming and grouping error; see --segmentation."
    rank = 5
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a method with groups."""
        as_grouper(model, type(model).__name__)

    def prepare(self, config: Config, data: Data, name: str) -> WordSet:
        """Words, classes, thresholds and views; requires data with labels."""
        return read_word_set(config, data, name)

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """The method's own mIoU, and the oracle's for each stage."""
        grouper = as_grouper(model, type(model).__name__)
        asked = one.ready.for_model(grouper, reading)
        return evaluate_grouping(grouper, one.samples(), asked, **reading_of(reading))
