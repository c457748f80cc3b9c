"""Referring expressions: each names one object of its image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import require
from pipeline.evaluation.data import Data
from pipeline.evaluation.detection import IMAGES_AT_ONCE
from pipeline.evaluation.grounding import (
    Ask,
    ReferringAccuracy,
    as_grounder,
    locate,
    referring_captions,
    referring_phrases,
)
from pipeline.evaluation.grounding_figures import check_boxes, phrase_figure
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASKS: dict[str, Ask] = {"phrases": referring_phrases, "captions": referring_captions}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    expressions: str = option(
        "phrases",
        "referring_expression_texts",
        "Referring expressions: the phrases of a caption that name one object, or the captions (RefCOCO).",
    )


class ReferringExpressions(Task):
    """Accuracy of the best box; ``ready`` gives the expressions of a sample."""

    report = Report(
        "referring",
        "referring expressions",
        (
            *(Column("accuracy"), Column("r5", "R@5"), Column("r10", "R@10")),
            *(Column("mask_miou", "mask mIoU"), Column("mask_ciou", "mask cIoU")),
            *(Column("expressions", format=",.0f"), SAMPLES),
        ),
    )
    help = "Sets with expressions that name one object (RefCOCO, drawn), for a method that grounds phrases."
    rank = 6
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a method that grounds phrases."""
        as_grounder(model, type(model).__name__)

    def prepare(self, config: Config, data: Data, name: str) -> Ask:
        """The expressions of a sample; requires data with boxes."""
        check_boxes("referring_expressions", data)
        field = "referring_expression_texts"
        require(config.expressions in ASKS, field, config.expressions, " or ".join(ASKS))
        return ASKS[config.expressions]

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Accuracy of boxes, and intersection over union of masks."""
        accuracy = ReferringAccuracy()
        for located in locate(
            as_grounder(model, type(model).__name__),
            one.samples(),
            one.ready,
            batch=min(reading.evaluation_batch, IMAGES_AT_ONCE),
            threads=reading.evaluation_threads,
            precision=reading.evaluation_precision,
        ):
            accuracy.add(located)
        return accuracy.metrics()

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``expressions``: images with the annotated object of each expression (left) and its best box (right)."""
        return {"expressions": phrase_figure(model, one, one.ready, title)}
