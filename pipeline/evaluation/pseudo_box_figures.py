"""Figures of pseudo boxes: samples with their boxes, phrases and scores, and the histogram of scores."""

from typing import TYPE_CHECKING

from pipeline.errors import DataError
from pipeline.evaluation.data import spread
from pipeline.evaluation.drawing import ShownObject, draw
from pipeline.evaluation.figures import image_grid
from pipeline.loaders.detection import StoredBoxes, objects_in
from pipeline.loaders.images import as_stored, decode, encoded_image
from pipeline.loaders.sample_figures import blank_figure, readable, wrapped
from pipeline.loaders.samples import Samples, UnreadableSample
from pipeline.shards.objects import Objects
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Snapshot
from pipeline.stages.annotate.pseudo_boxes import BINS, JOB, PseudoBoxCounts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_DRAWN = 12
LETTERS = 24


def pseudo_box_figure(snapshot: Snapshot, name: str, least_score: float = 0.0, count: int = 12) -> "Figure":
    """``count`` samples from all over a snapshot with their pseudo boxes, at most ``MOST_DRAWN`` of them each.

    Raises:
        DataError: none of these samples has a readable image, or a shard is damaged.
    """
    stored = StoredBoxes(wanted=Wanted(name=name, job=JOB), least_score=least_score)
    samples = Samples(snapshot, open_shards=2, sidecars=(stored.wanted,))
    images, captions = [], []
    for number in spread(len(samples), count):
        try:
            sample = samples[number]
            objects = objects_in(sample, stored)
            images.append(draw(as_stored(decode(encoded_image(sample))), _shown(objects)))
            captions.append(wrapped(objects.caption, 48, 1))
        except UnreadableSample:
            continue
    if not images:
        raise DataError(f"{snapshot.uri}: none of {count} samples has a readable image")
    return image_grid(images, captions, title=f"{name}: boxes with a score of {least_score:g} or more")


def score_figure(counts: PseudoBoxCounts) -> "Figure":
    """The number of boxes by score."""
    figure = blank_figure(6, 3.5, str(counts.boxes) + " boxes by score")
    axis = figure.subplots()
    axis.bar([(place + 0.5) / BINS for place in range(BINS)], counts.histogram, width=0.9 / BINS)
    axis.set(xlim=(0, 1), xlabel="score", ylabel="boxes")
    return figure


def _shown(objects: Objects) -> list[ShownObject]:
    """The best boxes, in one colour for each phrase."""
    owner = {number: place for place, phrase in enumerate(objects.phrases) for number in phrase.objects}
    shown = []
    for number in range(min(len(objects), MOST_DRAWN)):
        x1, y1, x2, y2 = objects.boxes[number].tolist()
        text = f"{readable(objects.labels[number])[:LETTERS]} {objects.scores[number]:.2f}"
        shown.append(ShownObject((x1, y1, x2, y2), text, owner.get(number, 0)))
    return shown
