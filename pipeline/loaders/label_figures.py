"""Label maps as colours over their image, with a legend."""

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.loaders.sample_figures import blank_figure, readable, show_image
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.segmentation import SegmentationReader
from pipeline.shards.objects import names_of
from pipeline.shards.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPACITY = 0.65
GOLDEN = 0.618034  # part of the colour circle between two classes: neighbours differ, and none repeats
GROUP_COLOURS = 5000  # the first colour of groups, so that a group looks like no class of a small set
LONGEST = 24  # characters of a name in a legend


def class_colour(number: int) -> tuple[int, int, int]:
    """The colour of a class number, the same in all figures."""
    red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN % 1, (0.85, 0.55)[number // 7 % 2], (0.9, 0.65)[number % 2])
    return round(red * 255), round(green * 255), round(blue * 255)


def _shade(number: int) -> tuple[float, float, float]:
    """The colour as matplotlib has it."""
    red, green, blue = (value / 255 for value in class_colour(number))
    return red, green, blue


def painted(image: Tensor, labels: Tensor, opacity: float = OPACITY, first: int = 0) -> Tensor:
    """The image, uint8 [3, H, W], under the colours of ``labels`` [H, W]; void (negative) pixels stay as they are.

    ``first`` is added to the numbers for other colours than those of the classes.

    Raises:
        DataError: they differ in size.
    """
    if image.shape[1:] != labels.shape:
        raise DataError(f"labels of {tuple(labels.shape)} on an image of {tuple(image.shape[1:])}")
    numbers, places = labels.long().unique(return_inverse=True)
    table = torch.tensor([class_colour(max(number, 0) + first) for number in numbers.tolist()]).float()
    mixed = image.cpu().float() * (1 - opacity) + table[places].permute(2, 0, 1).cpu() * opacity
    return torch.where((labels < 0).cpu(), image.cpu(), mixed.round().to(torch.uint8))


def label_figure(
    rows: Sequence[tuple[Tensor, Sequence[Tensor]]],
    names: Sequence[str],
    titles: Sequence[str],
    title: str = "",
    per_row: int = 1,
    inches: float = 2.4,
    groups: Sequence[Sequence[Tensor]] = (),
) -> "Figure":
    """Images, uint8 [3, H, W], each followed by its label maps [H, W], ``per_row`` of them in a row, and a legend.

    ``titles`` are those of the columns of one image, each ``inches`` wide. The legend has the classes that are seen.
    ``groups`` are maps of each image that have no names, one for each stage of a grouping: they are further columns,
    titled with their number of groups, one image in a row.
    """
    from matplotlib.patches import Patch

    stages = max((len(some) for some in groups), default=0)
    per_row = 1 if stages else per_row
    columns, lines = (len(titles) + stages) * per_row, -(-len(rows) // per_row)
    seen = sorted({number for _, maps in rows for one in maps for number in one.unique().tolist() if number >= 0})
    legend_rows = -(-len(seen) // max(1, 2 * columns))
    tallest = min(3.0, max((image.shape[1] / image.shape[2] for image, _ in rows), default=1.0))
    figure = blank_figure(inches * columns, (inches * tallest + 0.3) * lines + 0.5 + 0.25 * legend_rows, title)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    tiles = _tiles(rows, titles, groups)
    for place, axis in enumerate(axes):
        if place < len(tiles):
            show_image(axis, tiles[place][0])
            axis.set_title(readable(tiles[place][1]), fontsize=9, parse_math=False)
        else:
            axis.axis("off")
    patches = [Patch(color=_shade(number), label=class_title(names[number])) for number in seen]
    if patches:
        legend = figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 2 * columns))
        for text in legend.get_texts():
            text.set_parse_math(False)
            text.set_fontsize(8)
    return figure


def _tiles(
    rows: Sequence[tuple[Tensor, Sequence[Tensor]]], titles: Sequence[str], groups: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, str]]:
    """The images of a figure with their titles: each with its label maps, then with its groups by stage."""
    tiles = []
    for place, (image, maps) in enumerate(rows):
        tiles += [
            (shown, name) for shown, name in zip((image, *(painted(image, one) for one in maps)), titles, strict=True)
        ]
        for stage, one in enumerate(groups[place] if groups else (), 1):
            count = len(one.unique())
            tiles.append((painted(image, one, first=GROUP_COLOURS), f"stage {stage}: {count} group{'s' * (count > 1)}"))
    return tiles


def class_title(word: str) -> str:
    """The first name of a class, cut to the width of a legend."""
    name = readable(names_of(word)[0]) or "?"
    return name if len(name) <= LONGEST else name[: LONGEST - 2].rstrip() + " \u2026"


def samples_with_labels(
    reader: SegmentationReader, samples: Sequence[Sample], names: Sequence[str], title: str
) -> "Figure":
    """The images of ``samples`` beside their label maps, without unreadable ones.

    Raises:
        DataError: none is readable.
    """
    rows, reason = [], "there are none"
    for sample in samples:
        try:
            row = reader.read(sample)
        except UnreadableSample as error:
            reason = str(error)
        else:
            rows.append((row["image"], [row["labels"]]))
    if not rows:
        raise DataError(f"none of {len(samples)} samples is readable; the last one: {reason}")
    return label_figure(rows, names, ("image", "labels"), title, per_row=2)
