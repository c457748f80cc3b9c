"""Optimised images on one page: a row for each method, a column for each subject."""

import io
import re
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.loaders.sample_figures import FONT, wrapped
from pipeline.runs.drawing_report import best_names
from pipeline.runs.drawings import IMAGES, DrawingResult
from pipeline.shards.privacy import masked
from pipeline.shards.storage import Folder

MOST_COLUMNS, MOST_ROWS = 12, 10
CELL, GAP, LABEL = 96, 6, 150
COLOURS = 128
"""Of the page's palette, which keeps the file small."""
LETTERS, LINES = 15, 5  # of a heading


def sheet(results: Sequence[DrawingResult], folder: Folder, photos: Mapping[str, NDArray[np.uint8]]) -> bytes:
    """A PNG of the best seeds: images of ``folder`` below the texts, or the ``photos`` uint8 [H, W, 3], of subjects.

    At most 12 subjects, and 10 methods. Names of methods have the options in which they differ.
    """
    best = best_names(results)
    chosen = {(one.unit.method, one.unit.subject): one for one in results if one.unit.name in best}
    methods = list(dict.fromkeys(method for method, _ in chosen))[:MOST_ROWS]
    subjects = list(dict.fromkeys(subject for method, subject in chosen if method in methods))[:MOST_COLUMNS]
    step = CELL + GAP
    page = Image.new("RGB", (LABEL + step * len(subjects), step * (len(methods) + 1)), "white")
    pen = ImageDraw.Draw(page)
    for column, subject in enumerate(subjects):
        at = (LABEL + step * column, GAP)
        if subject in photos:
            page.paste(_fitted(Image.fromarray(photos[subject])), at)
        else:
            _write(pen, subject, at)
    for row, (method, name) in enumerate(zip(methods, short_names(methods), strict=True), start=1):
        _write(pen, name, (GAP, step * row))
        for column, subject in enumerate(subjects):
            if (result := chosen.get((method, subject))) is not None:
                image = Image.open(io.BytesIO(folder.folder(IMAGES).read_bytes(f"{result.unit.name}.png")))
                page.paste(_fitted(image), (LABEL + step * column, step * row))
    stream = io.BytesIO()
    page.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def short_names(methods: Sequence[str]) -> list[str]:
    """Methods with those of their options that not all methods of the same name have."""
    parsed = []
    for text in methods:
        name, _, settings = text.partition(":")
        parsed.append((name, [part for part in re.split(r",(?=[\w.]+=)", settings) if part]))
    found = []
    for name, options in parsed:
        same = [set(others) for other, others in parsed if other == name]
        own = [option for option in options if option not in set.intersection(*same)]
        found.append(" ".join([name, *own]))
    return found


def _fitted(image: Image.Image) -> Image.Image:
    """At most CELL pixels a side; small images by whole factors, so that their pixels stay sharp."""
    factor = CELL / max(image.size)
    factor = max(1, int(factor)) if factor >= 1 else factor
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS)


def _write(pen: ImageDraw.ImageDraw, text: str, at: tuple[int, int]) -> None:
    pen.multiline_text(at, wrapped(masked(text), LETTERS, LINES), fill="black", font=_font(), spacing=2)


@cache
def _font() -> ImageFont.FreeTypeFont:
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont(FONT), 11)
