#!/usr/bin/env python
"""Detect the objects named by words, or by a text, in an image: prints a table, draws boxes, names, scores and masks.

    python jobs/detect.py image IMAGE --checkpoint RUN --words "red star" circle --output found.png
    python jobs/detect.py image s3://bucket/street.jpg --checkpoint RUN --words dog bicycle --json
    python jobs/detect.py image IMAGE --checkpoint RUN --text "there are some holes on the road"

--words works with every method that has `predict`. Words are any class names, also without boxes in the training data.
--text works with every method that has `ground`: the noun phrases of the text are located.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import tyro
from torch import Tensor

from pipeline.config import require, run_job, writable_file
from pipeline.evaluation.drawing import draw_detections, with_legend
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.models import load_detector, load_grounder
from pipeline.evaluation.report import detections_table
from pipeline.loaders.images import as_stored
from pipeline.models.detections import Detections, Detector, Grounder, check_words
from pipeline.models.glip import Glip
from pipeline.models.method import build_method
from pipeline.models.vild import Vild
from pipeline.runs.drawn_data import DRAWN_IMAGE, read_image
from pipeline.shards.objects import names_of
from pipeline.shards.storage import split_file
from pipeline.stages.annotate.caption_phrases import Span, noun_phrases


@dataclass(frozen=True, kw_only=True)
class Detect:
    """An image, a detector, and the words or the text."""

    image: tyro.conf.Positional[str]
    """Image file: a path or any fsspec URI."""
    checkpoint: str
    """Checkpoint or run folder (path or URI) of a detector."""
    words: tuple[str, ...] = ()
    """Class names to detect; quote names of several words, and synonyms of one class: "couch; sofa"."""
    text: str = ""
    """Text whose noun phrases are located; instead of words."""
    extractor: str = "rules"
    """Extractor of the phrases of the text: rules, nltk, or spacy:MODEL."""
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


IMAGE = Detect(image=tyro.MISSING, checkpoint=tyro.MISSING)
PRESETS: dict[str, tuple[str, Detect]] = {
    "image": ("Detect the objects of --words or --text in one image.", IMAGE),
    "smoke": (
        "Detections of an untrained detector in a drawn image.",
        Smoke(image=DRAWN_IMAGE, checkpoint="", words=("star", "disc"), least_score=0.0, most=5),
    ),
    "smoke-text": (
        "Phrases of a text in a drawn image, by an untrained GLIP.",
        Smoke(image=DRAWN_IMAGE, checkpoint="", text="a red star next to the disc", least_score=0.0, most=5),
    ),
}


def main(run: Detect) -> None:
    """Check words and files, then detect, print and draw."""
    require(bool(run.words) != bool(run.text), "words", run.words, "words or a text, one of the two")
    spans = noun_phrases(run.text, run.extractor) if run.text else []
    require(bool(spans) or not run.text, "text", run.text, f"a text with a noun phrase that {run.extractor} finds")
    names = tuple(run.text[start:end] for start, end in spans) or run.words
    if run.words:
        check_words(run.words)
    folder, name = split_file(writable_file("output", run.output))
    image = as_stored(read_image(run.image))
    shown = best(ground(run, image, spans) if spans else detect(run, image), run)
    print(as_json(shown, names, spans) if run.json else detections_table(shown, names))
    drawn = draw_detections(image, shown, names, most=run.most)
    pixels = (with_legend(drawn, names) if spans else drawn).numpy().transpose(1, 2, 0)
    png = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
    folder.write_atomic(name, png)


def detect(run: Detect, image: Tensor) -> Detections:
    """The objects of the words; the smoke test's detector has random weights."""
    smoke = isinstance(run, Smoke)
    detector: Detector = build_method(Vild.smallest()).eval() if smoke else load_detector(run.checkpoint, run.device)
    with inference(detector):
        (found,) = detector.predict([image], run.words)
    return found


def ground(run: Detect, image: Tensor, spans: Sequence[Span]) -> Detections:
    """The objects of the phrases, labelled by the number of their span."""
    smoke = isinstance(run, Smoke)
    grounder: Grounder = build_method(Glip.smallest()).eval() if smoke else load_grounder(run.checkpoint, run.device)
    with inference(grounder):
        (found,) = grounder.ground([image], [run.text], [spans])
    return Detections(found.boxes, found.scores, found.spans, found.masks)


def best(found: Detections, run: Detect) -> Detections:
    """The shown detections; they are sorted by score."""
    count = min(run.most, int((found.scores >= run.least_score).sum()))
    masks = None if found.masks is None else found.masks[:count]
    return Detections(found.boxes[:count], found.scores[:count], found.labels[:count], masks)


def as_json(found: Detections, names: Sequence[str], spans: Sequence[Span]) -> str:
    """A list of ``{"word", "score", "box": [x1, y1, x2, y2]}``, sorted by score; of a text with the word's ``span``."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    plain = [
        {"word": names_of(names[label])[0], "score": score, "box": box} | ({"span": spans[label]} if spans else {})
        for label, score, box in rows
    ]
    return json.dumps(plain, indent=2)


if __name__ == "__main__":
    run_job(PRESETS, main)
