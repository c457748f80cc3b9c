"""Figures of samples: images with captions, frames of clips in a row, or a table of what other samples hold.

Each function gives a matplotlib figure of its own, without pyplot's global state, so it can be called from any thread
and nothing has to be closed. Captions come from the open web: they are shown as plain text (no TeX), wrapped, cut,
and what the font cannot draw becomes a box.
"""

import logging
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.codecs.point_views import depth_image
from pipeline.errors import DataError, SampleError
from pipeline.loaders.frames import FrameSampling
from pipeline.loaders.images import ImageTransform, resize
from pipeline.loaders.points import PointReader
from pipeline.loaders.readers import FirstCaptionReader, ImageReader
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.media import POINTS, VIDEO
from pipeline.shards.sample import Sample
from pipeline.shards.video_frames import Frames, read_frames

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

FONT = "DejaVu Sans"
BOX = "\u25a1"
SHOWN = ImageTransform(size=(160, 160), fit="longest", fill=255)
TEXTS = ("txt", "json")  # fields that are read as text where samples have no image
CLIPS = 8  # of a figure
FRAMES, HEIGHT, GAP = 8, 96, 2
"""Frames of a row, their height and the white columns between them, in pixels."""
LONGEST = 400  # characters of a field that are shown


def sample_figure(samples: Sequence[Sample], title: str, caption: str = "auto") -> "Figure":
    """The images of ``samples`` with their captions (``txt``, ``json:KEY`` or ``auto``), without the unreadable ones.

    Where no sample has an image, it shows the frames of the first clips, or views of the first point clouds; without
    these it is a table: their keys, texts, and the sizes of their other fields.

    Raises:
        DataError: samples have images, and none is readable.
    """
    if not any(sample.image() for sample in samples):
        words = FirstCaptionReader(caption=caption)
        for medium, grid in ((VIDEO, clip_grid), (POINTS, cloud_grid)):
            if having := [one for one in samples if one.body(medium)][:CLIPS]:
                return grid(having, [words.read(one)["caption"] for one in having], title=title)
        fields = sorted({field for sample in samples for field in sample.fields})
        rows = [[sample.key, *(_shown(sample, field) for field in fields)] for sample in samples]
        return sample_table(["key", *fields], rows, title)
    image, text = ImageReader(transform=SHOWN), FirstCaptionReader(caption=caption)
    shown, reason = [], ""
    for sample in samples:
        try:
            shown.append((image.read(sample)["image"], text.read(sample)["caption"]))
        except UnreadableSample as error:
            reason = str(error)
            logger.warning("sample %s is unreadable and is not shown: %s", sample.key, error)
    if not shown:
        raise DataError(f"none of {len(samples)} samples is readable; the last one: {reason}")
    return sample_grid(torch.stack([image for image, _ in shown]), [text for _, text in shown], title=title)


def sample_grid(images: Tensor, captions: Sequence[str], columns: int = 4, title: str = "") -> "Figure":
    """Images, uint8 ``[N, 3, H, W]``, each above its caption."""
    rows = -(-len(images) // columns)
    figure = blank_figure(2.5 * columns, 3.3 * rows + 0.4, title)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for place, axis in enumerate(axes):
        if place < len(images):
            show_image(axis, images[place])
            _caption(axis, captions[place], width=30, lines=5)
        else:
            axis.axis("off")
    return figure


def frames_of(sample: Sample, count: int = FRAMES) -> Frames:
    """``count`` frames at equal distances, each the middle one of its part.

    Raises:
        UnreadableSample: the sample has no readable video.
    """
    body = sample.body(VIDEO)
    if body is None:
        raise UnreadableSample(f"{sample.key} has no video")
    sampling = FrameSampling(mode="segments", frames=count)
    try:
        return read_frames(body, sampling.frame_times, size=2 * HEIGHT)
    except SampleError as error:
        raise UnreadableSample(f"{sample.key}: {error.message}") from error


def contact_row(frames: Frames) -> Tensor:
    """The frames side by side: uint8 [3, ``HEIGHT``, W]."""
    width = max(1, round(HEIGHT * frames.pixels.shape[2] / frames.pixels.shape[1]))
    cells = [resize(pixels, (HEIGHT, width)) for pixels in frames.pixels]
    white = torch.full((3, HEIGHT, GAP), 255, dtype=torch.uint8)
    parts = [part for cell in cells for part in (cell, white)]
    return torch.cat(parts[:-1], dim=2)


def clip_grid(
    samples: Sequence[Sample], captions: Sequence[str], colours: Sequence[str] = (), title: str = ""
) -> "Figure":
    """Frames of each clip in a row, with their times below and its caption above, in its own of ``colours``.

    Samples without a readable video are shown as an empty row.
    """
    figure = blank_figure(11, 1.5 * len(samples) + 0.5, title)
    axes = figure.subplots(len(samples), 1, squeeze=False).flat
    for number, (axis, sample, caption) in enumerate(zip(axes, samples, captions, strict=True)):
        try:
            frames = frames_of(sample)
            row, times = contact_row(frames), frames.times
        except UnreadableSample:
            row, times = torch.full((3, HEIGHT, HEIGHT * FRAMES), 255, dtype=torch.uint8), np.zeros(0, np.float32)
        show_image(axis, row)
        pitch = (row.shape[2] + GAP) / max(len(times), 1)
        axis.set_xticks([pitch * (place + 0.5) - GAP / 2 for place in range(len(times))])
        axis.set_xticklabels([f"{time:.2f} s" for time in times.tolist()], fontsize=7)
        axis.tick_params(length=0, pad=1)
        colour = colours[number] if colours else "black"
        words = wrapped(caption, 120, 2) if len(times) else f"{wrapped(caption, 100, 1)} (not readable)"
        axis.set_title(words, fontsize=8.5, loc="left", pad=3, color=colour, parse_math=False)
    return figure


def cloud_grid(
    samples: Sequence[Sample],
    captions: Sequence[str],
    colours: Sequence[str] = (),
    title: str = "",
    reader: PointReader | None = None,
) -> "Figure":
    """Six views of each point cloud in a row, bright where points are near, with its caption above.

    Samples without a readable cloud are shown as an empty row. ``colours`` are those of the captions. ``reader`` knows
    the vertical axis; it is y without one.
    """
    figure = blank_figure(9, 1.75 * len(samples) + 0.5, title)
    axes = figure.subplots(len(samples), 1, squeeze=False).flat
    reader = reader or PointReader()
    for number, (axis, sample, caption) in enumerate(zip(axes, samples, captions, strict=True)):
        words = wrapped(caption, 110, 2)
        try:
            row = depth_image(reader.read(sample)[reader.key], size=HEIGHT)
        except UnreadableSample:
            row = torch.full((3, HEIGHT, HEIGHT * 6), 255, dtype=torch.uint8)
            words = f"{wrapped(caption, 90, 1)} (not readable)"
        show_image(axis, row)
        colour = colours[number] if colours else "black"
        axis.set_title(words, fontsize=8.5, loc="left", pad=3, color=colour, parse_math=False)
    return figure


def sample_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> "Figure":
    """Samples that are no images: a line of texts for each, wrapped and cut."""
    figure = blank_figure(2.6 * max(2, len(head)), 0.5 * (len(rows) + 1) + 0.6, title)
    axis = figure.subplots()
    axis.axis("off")
    cells = [[wrapped(text, 34, 2) for text in row] for row in rows] or [[""] * len(head)]
    drawn = axis.table(cells, colLabels=[wrapped(text, 34, 1) for text in head], loc="center", cellLoc="left")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.scale(1, 2)
    for cell in drawn.get_celld().values():
        cell.get_text().set_parse_math(False)
    return figure


def readable(text: str) -> str:
    """``text`` on one line, with a box in place of every character that the figures' font cannot draw."""
    drawable = _drawable()
    plain = "".join(letter for letter in text if letter.isprintable() or letter.isspace())
    return "".join(letter if ord(letter) in drawable else BOX for letter in " ".join(plain.split()))


@cache
def _drawable() -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(FONT)).get_charmap())


def wrapped(text: str, width: int, lines: int) -> str:
    """At most ``lines`` lines of ``width`` characters; words longer than a line are broken."""
    whole = textwrap.wrap(readable(text[: 4 * width * lines]), width) or ["(no caption)"]
    if len(whole) > lines:
        whole[lines - 1] = whole[lines - 1][: width - 2].rstrip() + " \u2026"
    return "\n".join(whole[:lines])


def blank_figure(width: float, height: float, title: str = "") -> "Figure":
    """A figure of ``width`` x ``height`` inches without axes, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(readable(title), fontsize=12, parse_math=False)
    return figure


def show_image(axis: "Axes", image: Tensor) -> None:
    """Draw an image, uint8 [3, H, W]."""
    axis.imshow(image.cpu().numpy().transpose(1, 2, 0))
    axis.set_xticks([])
    axis.set_yticks([])


def _caption(axis: "Axes", text: str, width: int, lines: int) -> None:
    axis.set_xlabel(wrapped(text, width, lines), fontsize=8.5, family=FONT, parse_math=False)


def _shown(sample: Sample, field: str) -> str:
    content = sample.fields.get(field)
    if content is None:
        return "-"
    if field in TEXTS or field.endswith(".json"):
        return content[: 4 * LONGEST].decode("utf-8", errors="replace")[:LONGEST]
    return f"{len(content):,} bytes"
