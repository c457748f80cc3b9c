#!/usr/bin/env python
"""Evaluate the images of jobs/draw_prompts.py by a CLIP that guided none of them.

    python jobs/evaluate_drawings.py prompts --drawings runs/drawn \
        --judge ViT-L-14-quickgelu:openai --distractors texts.txt
    python jobs/evaluate_drawings.py sketches --drawings runs/sketched --classes classes.txt --labels labels.csv

Prints a table with a row for each method: the cosine with the prompts, the R-precision of the prompts among all prompts
of the folder and --distractors, and the accuracy of a zero-shot classifier by the number of strokes. It is stored in
evaluation.md, and the numbers of each image in evaluation.parquet.
"""

import getpass
import tempfile
from dataclasses import dataclass, field
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_folder
from pipeline.dataset import card_names, load_card
from pipeline.evaluation.classes import lines_of, read_classes, read_templates
from pipeline.evaluation.generated_images import SKETCH_TEMPLATES
from pipeline.evaluation.models import usable_device
from pipeline.runs.drawing_evaluation import (
    JudgingTexts,
    evaluate_drawings,
    evaluation_table,
    judged_parquet,
    read_labels,
    summaries,
)
from pipeline.runs.drawing_report import metric_name
from pipeline.runs.drawings import load_guide
from pipeline.runs.drawn_data import drawn_drawings
from pipeline.shards.storage import Folder
from pipeline.tracking.runs import Tracking, open_tracker

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/evaluated-drawings"
TABLE, NUMBERS = "evaluation.md", "evaluation.parquet"


@dataclass(frozen=True, kw_only=True)
class EvaluateDrawings:
    """One folder of images, a judge, and the texts that images are compared with."""

    drawings: str
    """Output folder of jobs/draw_prompts.py: a path or a URI."""
    judge: str = "ViT-L-14-quickgelu:openai"
    """CLIP that judges: an address as in jobs/evaluate.py, none of those that guided an image."""
    distractors: str = ""
    """File with a text in each line, beside the prompts, for R-precision; empty for the prompts of the folder alone."""
    classes: str = ""
    """Class names for recognition: a file with a name in each line, imagenet, or a card such as drawn_shapes."""
    templates: str = "auto"
    """Templates of class names: auto (the card's, else a sketch and a drawing of), imagenet, none, or a file."""
    labels: str = ""
    """CSV file with the columns subject and class; empty for the class named in the prompt or in the image's file."""
    images: Literal["all", "best"] = "all"
    """Images of all seeds, or of the seed with the lowest loss of each method and subject."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the judge; auto uses a GPU if available."""
    draw: bool = False
    """Draw two images with untrained models into an empty folder first."""
    track: bool = True
    """Log the numbers to an MLflow run."""
    tracking: Tracking = field(
        default_factory=lambda: Tracking(system_metrics=False, primary_metric="drawing/r_precision")
    )

    def __post_init__(self) -> None:
        require(bool(self.classes) or not self.labels, "labels", self.labels, "none, or --classes with their names")


PRESETS = {
    "prompts": ("Score and R-precision of images of prompts.", EvaluateDrawings(drawings=tyro.MISSING)),
    "sketches": (
        "Recognition of the best sketches, by the number of strokes.",
        EvaluateDrawings(drawings=tyro.MISSING, classes=tyro.MISSING, images="best"),
    ),
    "smoke": (
        "Two images and a judge with untrained models, in this process.",
        EvaluateDrawings(
            drawings=SMOKE, judge="clipmill-small:untrained", classes="drawn_shapes", draw=True, track=False
        ),
    ),
}


def texts_of(run: EvaluateDrawings) -> JudgingTexts:
    """The files and cards that the settings name."""
    card = load_card(run.classes) if run.classes in card_names() else None
    distractors = lines_of("distractors", run.distractors, "a file with a text in each line") if run.distractors else ()
    if not run.classes:
        return JudgingTexts(distractors=distractors)
    own = SKETCH_TEMPLATES if run.templates == "auto" and card is None else None
    return JudgingTexts(
        distractors=distractors,
        classes=read_classes("auto" if card else run.classes, card, run.classes),
        templates=own or read_templates(run.templates, card, run.classes),
        labels=read_labels(run.labels) if run.labels else None,
    )


def main(run: EvaluateDrawings) -> None:
    """Wire folder, judge and texts."""
    folder, texts = Folder(writable_folder("drawings", run.drawings)), texts_of(run)
    if run.draw:
        drawn_drawings(folder)
    judged = evaluate_drawings(folder, load_guide(run.judge, usable_device(run.device)), texts, run.images == "best")
    table = evaluation_table(judged, texts)
    folder.write_atomic(NUMBERS, judged_parquet(judged))
    folder.write_atomic(TABLE, table.encode())
    with open_tracker(run.tracking, run, new=run.track) as tracker:
        tracker.describe(table)
        tracker.log_text(TABLE, table)
        for method, numbers in summaries(judged).items():
            tracker.log({f"drawing/{metric_name(method)}/{name}": value for name, value in numbers.items()}, step=0)
    print(table)


if __name__ == "__main__":
    run_job(PRESETS, main)
