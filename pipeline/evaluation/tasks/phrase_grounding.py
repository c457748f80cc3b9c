"""Phrase grounding, in sets whose captions have phrases with boxes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import require
from pipeline.evaluation.data import Data
from pipeline.evaluation.detection import IMAGES_AT_ONCE
from pipeline.evaluation.grounding import PhraseRecall, annotated_phrases, as_grounder, locate
from pipeline.evaluation.grounding_figures import check_boxes, phrase_figure
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    boxes: str = option(
        "any",
        "phrase_grounding_boxes",
        "Annotated boxes of a phrase with several objects: any of them counts, or merged into one box around all.",
    )


class PhraseGrounding(Task):
    """Recall of phrases; ``ready`` is True for merged boxes."""

    report = Report(
        "grounding",
        "phrases",
        (
            *(Column("r1", "R@1"), Column("r5", "R@5"), Column("r10", "R@10"), Column("r_all", "any box")),
            *(Column("no_box", "no box"), Column("phrases", format=",.0f"), SAMPLES),
        ),
    )
    help = "Sets whose captions have phrases with boxes (Flickr30k Entities, drawn), for a method that grounds phrases."
    rank = 5
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a method that grounds phrases."""
        as_grounder(model, type(model).__name__)

    def prepare(self, config: Config, data: Data, name: str) -> bool:
        """Whether boxes are merged; requires data with boxes."""
        check_boxes("phrase_grounding", data)
        require(config.boxes in ("any", "merged"), "phrase_grounding_boxes", config.boxes, "any or merged")
        return config.boxes == "merged"

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """R@1, R@5 and R@10, over all phrases and by kind."""
        recall = PhraseRecall(merged=one.ready)
        for located in locate(
            as_grounder(model, type(model).__name__),
            one.samples(),
            annotated_phrases,
            batch=min(reading.evaluation_batch, IMAGES_AT_ONCE),
            threads=reading.evaluation_threads,
            precision=reading.evaluation_precision,
        ):
            recall.add(located)
        return recall.metrics()

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``phrases``: images with the annotated boxes of their phrases (left) and the best box of each (right)."""
        return {"phrases": phrase_figure(model, one, annotated_phrases, title)}
