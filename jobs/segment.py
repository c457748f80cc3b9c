#!/usr/bin/env python
"""Segment an image by words: prints the part of the image that each word has, and writes an overlay with a legend.

    python jobs/segment.py image IMAGE --checkpoint RUN --words "red circle" grass --output segments.png
    python jobs/segment.py image s3://bucket/street.jpg --checkpoint ViT-B-16-quickgelu:openai --words road sky car
    python jobs/segment.py image IMAGE --checkpoint runs/groupvit --words dog grass --groups       # and its groups

Works with every method that has `segment`, and with the patches of a plain CLIP. Words are any class names. A word such
as other or background stands for what the other words do not name.
"""

from dataclasses import dataclass
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_file
from pipeline.evaluation.background import Background, read_thresholds
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.grouping import as_grouper
from pipeline.evaluation.models import load_segmenter
from pipeline.evaluation.report import segments_table
from pipeline.evaluation.segmentation import groups_of
from pipeline.evaluation.showcase import segments_png
from pipeline.loaders.images import as_stored
from pipeline.models.lseg import Lseg
from pipeline.models.method import build_method
from pipeline.models.segments import ImageViews, Segmenter, check_segment_words
from pipeline.runs.drawn_data import DRAWN_IMAGE, read_image
from pipeline.shards.storage import split_file


@dataclass(frozen=True, kw_only=True)
class Segment:
    """An image, a segmenter, and the words."""

    image: tyro.conf.Positional[str]
    """Image file: a path or any fsspec URI."""
    checkpoint: str
    """Checkpoint or run folder (path or URI) of a segmenter or a CLIP, or ARCHITECTURE:WEIGHTS."""
    words: tuple[str, ...]
    """Class names to segment by; quote names of several words."""
    output: str = "segments.png"
    """PNG file for the image under the words' colours: a path or a URI."""
    threshold: float | str = 0.0
    """Probability of the best word below which a pixel gets no colour: a number from 0 to 1, or a JSON file
    {word: number} for a threshold of each word."""
    side: int | None = None
    """Longer side to which the image is resized, in pixels; none for the model's own input."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of the side whose results are averaged."""
    flip: bool = False
    """Average with the mirrored image."""
    groups: bool = False
    """Show the groups of each stage, too, for methods that group pixels."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto uses a GPU if available."""

    def __post_init__(self) -> None:
        require(self.output.endswith(".png"), "output", self.output, "a file that ends in .png")
        self.views()

    def views(self) -> ImageViews:
        """The views of the image."""
        return ImageViews(side=self.side, scales=self.scales, flip=self.flip)


@dataclass(frozen=True, kw_only=True)
class Smoke(Segment):
    """The same job, with an untrained segmenter, on an image that it draws first."""


PRESETS: dict[str, tuple[str, Segment]] = {
    "image": (
        "Segment one image by --words.",
        Segment(image=tyro.MISSING, checkpoint=tyro.MISSING, words=tyro.MISSING),
    ),
    "smoke": (
        "Segments of an untrained segmenter in a drawn image.",
        Smoke(image=DRAWN_IMAGE, checkpoint="", words=("star", "disc", "background")),
    ),
}


def main(run: Segment) -> None:
    """Check words and files, then segment, print and draw."""
    check_segment_words(run.words)
    background = Background(read_thresholds(run.threshold, run.words, "threshold"))
    folder, name = split_file(writable_file("output", run.output))
    image = as_stored(read_image(run.image))
    segmenter = load(run)
    grouper = as_grouper(segmenter, run.checkpoint or "the smoke test's segmenter") if run.groups else None
    with inference(segmenter):
        (found,) = segmenter.segment([image], run.words, run.views())
    shown = background.removed(found)
    print(segments_table(shown, run.words))
    (groups,) = groups_of(grouper, [image])
    folder.write_atomic(name, segments_png(image, shown, run.words, groups))


def load(run: Segment) -> Segmenter:
    """The segmenter; the smoke test's has random weights."""
    if isinstance(run, Smoke):
        built: Segmenter = build_method(Lseg.smallest()).eval()  # type: ignore[assignment]
        return built
    return load_segmenter(run.checkpoint, run.device)


if __name__ == "__main__":
    run_job(PRESETS, main)
