"""Detections and grounded phrases drawn on their image: masks, boxes, names with scores, and a legend of phrases."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.sample_figures import FONT, readable
from pipeline.models.detections import Detections, GroundedBoxes
from pipeline.shards.objects import Objects, names_of, plain_word
from pipeline.shards.segmentation import mask_of

COLOURS = (
    *((214, 39, 40), (31, 119, 180), (44, 140, 44), (148, 80, 189), (200, 90, 0), (0, 130, 145)),
    *((197, 27, 125), (110, 75, 60), (70, 70, 160), (120, 120, 0)),
)
SMALLEST_SIDE = 480
"""Pixels of the longer side; smaller images are magnified to it, so that names are readable."""
LETTERS = 30  # maximum length of a shown name
TINT = 0.45
GAP = 6  # pixels between the parts of a legend


@dataclass(frozen=True)
class ShownObject:
    """An object to draw: its box x1, y1, x2, y2 in the image's pixels, its label, and its mask, bool [H, W] or none."""

    box: tuple[float, float, float, float]
    text: str
    colour: int
    mask: NDArray[np.bool_] | None = None


def draw_detections(
    image: Tensor, found: Detections, words: Sequence[str], least: float = 0.0, most: int = 20
) -> Tensor:
    """The image, uint8 [3, H, W], with the ``most`` best detections that score ``least`` or more; see :func:`draw`.

    Args:
        image: the input of ``predict``.
        found: the result of ``predict``.
        words: the requested words.
        least: minimum score of drawn detections, 0 to 1.
        most: 1 or more.
    """
    require(0 <= least <= 1, "least_score", least, "0 to 1")
    require(most >= 1, "most", most, "1 or more")
    count = min(most, int((found.scores >= least).sum()))
    masks = found.whole_masks(image.shape[1], image.shape[2], 0, count).numpy() if found.masks is not None else None
    objects = []
    for place in range(count):
        x1, y1, x2, y2 = found.boxes[place].tolist()
        label, score = int(found.labels[place]), float(found.scores[place])
        mask = None if masks is None else masks[place]
        objects.append(ShownObject((x1, y1, x2, y2), f"{short_name(words[label])} {score:.2f}", label, mask))
    return draw(image, objects)


def draw_marked(image: Tensor, marked: Objects, words: Sequence[str]) -> Tensor:
    """The image, uint8 [3, H, W], with its annotated objects, in the same colours per word as detections."""
    places = {plain_word(word): place for place, word in enumerate(words)}
    objects = []
    for place, label in enumerate(marked.labels):
        x1, y1, x2, y2 = marked.boxes[place].tolist()
        colour = places.get(plain_word(label), -1)
        objects.append(ShownObject((x1, y1, x2, y2), short_name(label), colour, shown_mask(marked, place)))
    return draw(image, objects)


def draw_grounded(
    image: Tensor, found: GroundedBoxes, phrases: Sequence[str], least: float = 0.0, most: int = 20
) -> Tensor:
    """The image, uint8 [3, H, W], with the ``most`` best boxes that score ``least`` or more, one colour per phrase.

    Args:
        image: the input of ``ground``.
        found: the result of ``ground``.
        phrases: the text of each requested span.
        least: minimum score of drawn boxes, 0 to 1.
        most: 1 or more.
    """
    masks = found.masks
    return draw_detections(image, Detections(found.boxes, found.scores, found.spans, masks), phrases, least, most)


def with_legend(image: Tensor, phrases: Sequence[str]) -> Tensor:
    """The image, uint8 [3, H, W], above a legend of ``phrases`` in the colours of :func:`draw_grounded`."""
    height, width = image.shape[1:]
    font = _font(max(12, round(max(height, width) / 34)))
    line = sum(font.getmetrics()) + GAP
    swatch = line - GAP
    x, y = GAP, GAP
    places = []
    for number, phrase in enumerate(phrases):
        text = short_name(phrase)
        needed = swatch + GAP + round(font.getlength(text)) + 2 * GAP
        if x > GAP and x + needed > width:
            x, y = GAP, y + line
        places.append((x, y, text, COLOURS[number % len(COLOURS)]))
        x += needed
    strip = Image.new("RGB", (width, y + line if phrases else 0), "white")
    pen = ImageDraw.Draw(strip)
    for x, y, text, colour in places:
        pen.rectangle([x, y, x + swatch - 1, y + swatch - 1], fill=colour)
        pen.text((x + swatch + GAP, y), text, fill="black", font=font)
    below = torch.from_numpy(np.asarray(strip).transpose(2, 0, 1).copy())
    return torch.cat([image, below], dim=1)


def shown_mask(marked: Objects, place: int) -> NDArray[np.bool_] | None:
    """The mask of an annotated object, bool [H, W], if it has one; raises ``DataError`` for an invalid one."""
    segmentation = marked.segmentations[place]
    try:
        return None if segmentation is None else mask_of(segmentation, marked.height, marked.width).astype(bool)
    except DataError as error:
        raise DataError(f"object {marked.labels[place]} of sample {marked.key}: {error}") from error


def draw(image: Tensor, objects: Sequence[ShownObject]) -> Tensor:
    """``objects`` on an image, the first on top; uint8 [3, H, W], with a longer side of 480 pixels or more."""
    pixels = np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0))
    for shown in reversed(objects):
        if shown.mask is not None:
            pixels = _tinted(pixels, shown.mask, COLOURS[shown.colour % len(COLOURS)])
    scale = max(1.0, SMALLEST_SIDE / max(pixels.shape[:2]))
    size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
    canvas = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    for shown in reversed(objects):
        _outline(pen, [value * scale for value in shown.box], COLOURS[shown.colour % len(COLOURS)], size)
    taken: list[tuple[float, float, float, float]] = []
    for shown in objects:
        _write(pen, shown, scale, size, taken)
    return torch.from_numpy(np.asarray(canvas).transpose(2, 0, 1).copy())


def _tinted(pixels: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    if mask.shape != pixels.shape[:2]:
        raise DataError(f"a mask of {mask.shape} on an image of {pixels.shape[:2]}")
    mixed = pixels.copy()
    mixed[mask] = (pixels[mask] * (1 - TINT) + np.array(colour) * TINT).astype(np.uint8)
    return mixed


def _outline(
    pen: ImageDraw.ImageDraw, box: Sequence[float], colour: tuple[int, int, int], size: tuple[int, int]
) -> None:
    """A line inside the box, with a thin white line around it for contrast on any background."""
    width = max(2, round(max(size) / 240))
    x1, y1 = (min(max(0.0, value), side - 1) for value, side in zip(box[:2], size, strict=True))
    x2, y2 = (max(low, min(value, side) - 1) for low, value, side in zip((x1, y1), box[2:], size, strict=True))
    pen.rectangle([max(0, x1 - 1), max(0, y1 - 1), min(size[0] - 1, x2 + 1), min(size[1] - 1, y2 + 1)], outline="white")
    pen.rectangle([x1, y1, x2, y2], outline=colour, width=width)


def _write(
    pen: ImageDraw.ImageDraw,
    shown: ShownObject,
    scale: float,
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write the name on a tag above its box, or at the next free position below."""
    font = _font(max(12, round(max(size) / 34)))
    left, top, right, bottom = pen.textbbox((0, 0), shown.text, font=font)
    width, height = right - left + 6, bottom - top + 4
    x = max(0.0, min(shown.box[0] * scale, size[0] - width))
    y = first = max(0.0, min(shown.box[1] * scale - height, size[1] - height))
    while any(_meet((x, y, x + width, y + height), other) for other in taken):
        y += height + 1
        if y + height > size[1]:  # no free position: cover another name
            y = first
            break
    pen.rectangle([x, y, x + width, y + height], fill=COLOURS[shown.colour % len(COLOURS)])
    pen.text((x + 3 - left, y + 2 - top), shown.text, fill="white", font=font)
    taken.append((x, y, x + width, y + height))


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def short_name(name: str) -> str:
    """The first name, cut to 30 letters, without characters that the font lacks."""
    plain = readable(names_of(name)[0])
    return plain if len(plain) <= LETTERS else plain[: LETTERS - 2].rstrip() + " \u2026"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont(FONT), size)
