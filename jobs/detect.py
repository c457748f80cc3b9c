#!/usr/bin/env python
"""Detect the objects named by words in an image: prints a table, draws boxes, names, scores and masks on the image.

    python jobs/detect.py picture IMAGE --checkpoint RUN --words "red star" circle --output found.png
    python jobs/detect.py picture s3://bucket/street.jpg --checkpoint RUN --words dog bicycle --json

Works with every method that has `predict`. Words are any class names, also without boxes in the training data.
"""

import json
from dataclasses import dataclass
from typing import Literal

import cv2
import tyro

from pipeline.config import require, run_job, writable_file
from pipeline.evaluation.drawing import draw_detections
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.models import load_detector
from pipeline.evaluation.report import detections_table
from pipeline.loaders.images import as_stored
from pipeline.models.detections import Detections, Detector, check_words
from pipeline.models.method import build_method
from pipeline.models.vild import Vild
from pipeline.runs.drawn_data import DRAWN_IMAGE, read_image
from pipeline.shards.objects import names_of
from pipeline.shards.storage import split_file


@dataclass(frozen=True, kw_only=True)
class Detect:
    """An image, a detector, and the words."""

    image: tyro.conf.Positional[str]
    """Image file: a path or any fsspec URI."""
    checkpoint: str
    """Checkpoint or run folder (path or URI) of a detector."""
    words: tuple[str, ...]
    """Class names to detect; quote names of several words, and synonyms of one class: "couch; sofa"."""
    output: str = "detections.png"
    """PNG file for the image with the detections: a path or a URI."""
    least_score: float = 0.05
    """Minimum score of listed and drawn detections, 0 to 1."""
    most: int = 20
    """Maximum number of listed and drawn detections, the highest-scoring ones."""
    json: bool = False
    """Print JSON instead of a table."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto uses a GPU if available."""

    def __post_init__(self) -> None:
        require(self.output.endswith(".png"), "output", self.output, "a file that ends in .png")
        require(0 <= self.least_score <= 1, "least_score", self.least_score, "0 to 1")
        require(self.most >= 1, "most", self.most, "1 or more")


@dataclass(frozen=True, kw_only=True)
class Smoke(Detect):
    """The same job, with an untrained detector, on an image that it draws first."""


PRESETS: dict[str, tuple[str, Detect]] = {
    "picture": (
        "Detect the objects of --words in one image.",
        Detect(image=tyro.MISSING, checkpoint=tyro.MISSING, words=tyro.MISSING),
    ),
    "smoke": (
        "Detections of an untrained detector in a drawn image.",
        Smoke(image=DRAWN_IMAGE, checkpoint="", words=("star", "disc"), least_score=0.0, most=5),
    ),
}


def main(run: Detect) -> None:
    """Check words and files, then detect, print and draw."""
    check_words(run.words)
    folder, name = split_file(writable_file("output", run.output))
    pixels = read_image(run.image)
    image = as_stored(pixels)
    detector = load(run)
    with inference(detector):
        (found,) = detector.predict([image], run.words)
    shown = best(found, run)
    print(as_json(shown, run.words) if run.json else detections_table(shown, run.words))
    drawn = draw_detections(image, shown, run.words, most=run.most).numpy().transpose(1, 2, 0)
    png = cv2.imencode(".png", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))[1].tobytes()
    folder.write_atomic(name, png)


def load(run: Detect) -> Detector:
    """The detector; the smoke test's has random weights."""
    if isinstance(run, Smoke):
        return build_method(Vild.smallest()).eval()
    return load_detector(run.checkpoint, run.device)


def best(found: Detections, run: Detect) -> Detections:
    """The shown detections; they are sorted by score."""
    count = min(run.most, int((found.scores >= run.least_score).sum()))
    masks = None if found.masks is None else found.masks[:count]
    return Detections(found.boxes[:count], found.scores[:count], found.labels[:count], masks)


def as_json(found: Detections, words: tuple[str, ...]) -> str:
    """A list of ``{"word", "score", "box": [x1, y1, x2, y2]}``, sorted by score."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    plain = [{"word": names_of(words[label])[0], "score": score, "box": box} for label, score, box in rows]
    return json.dumps(plain, indent=2)


if __name__ == "__main__":
    run_job(PRESETS, main)
