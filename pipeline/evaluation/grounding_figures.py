"""Figures of grounding: images with the annotated boxes of their phrases beside those that a method finds."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.config import require
from pipeline.evaluation.data import Data, SnapshotData
from pipeline.evaluation.drawing import ShownObject, draw, draw_grounded, short_name, shown_mask
from pipeline.evaluation.figures import image_grid
from pipeline.evaluation.grounding import Ask, LocatedPhrases, as_grounder, locate
from pipeline.evaluation.task import PreparedSet
from pipeline.loaders.sample_figures import wrapped
from pipeline.models.detections import GroundedBoxes
from pipeline.shards.objects import FIELD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 8
LETTERS, LINES = 44, 2  # of a caption above its image


def check_boxes(kind: str, data: Data) -> None:
    """Raise ``SettingError`` for a snapshot without ``boxes.json``."""
    if isinstance(data, SnapshotData):
        fields, place = data.snapshot.fields, data.snapshot.folder
        require(FIELD in fields, kind, place, f"data with boxes, {FIELD}; this has {', '.join(fields)}")


def phrase_figure(model: Any, one: PreparedSet, ask: Ask, title: str) -> "Figure":
    """At most eight images in pairs: annotated (left), and the best box of each phrase (right)."""
    method = as_grounder(model, type(model).__name__)
    images: list[Tensor] = []
    captions: list[str] = []
    for located in locate(method, one.samples(PAIRS), ask, batch=PAIRS, threads=2):
        images += [_annotated(located), _found(located)]
        captions += [wrapped(located.objects.caption, LETTERS, LINES), "the best box of each phrase"]
    named = f"{one.name} {title}".strip()
    return image_grid(images, captions, columns=4, title=f"{named}: annotated and found phrases")


def _annotated(located: LocatedPhrases) -> Tensor:
    objects = located.objects
    shown = []
    for number, phrase in enumerate(located.asked):
        for place in phrase.objects:
            x1, y1, x2, y2 = objects.boxes[place].tolist()
            text = short_name(objects.caption[phrase.start : phrase.end])
            # A mask hides the colour that the phrase names, so it is drawn where it is compared.
            mask = None if located.found.masks is None else shown_mask(objects, place)
            shown.append(ShownObject((x1, y1, x2, y2), text, number, mask))
    return draw(located.image, shown)


def _found(located: LocatedPhrases) -> Tensor:
    best = [place for number in range(len(located.asked)) if (place := located.best(number)) is not None]
    found = located.found
    kept = GroundedBoxes(
        found.boxes[best],
        found.scores[best],
        found.spans[best],
        None if found.masks is None else found.masks[best],
    )
    phrases = [located.objects.caption[one.start : one.end] for one in located.asked]
    return draw_grounded(located.image, kept, phrases, most=max(1, len(best)))
