"""Depth maps in colours beside their image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pipeline.errors import DataError
from pipeline.loaders.depth import DepthRange, DepthReader
from pipeline.loaders.sample_figures import blank_figure, show_image
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS, ERROR_COLOURS = "turbo_r", "inferno"  # near is warm
UNKNOWN = "0.85"  # grey of a pixel without a distance


def depth_figure(
    rows: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], titles: Sequence[str] = (), title: str = ""
) -> "Figure":
    """An image in each row beside its truth, the estimate, and the absolute error of the estimate, with colour bars.

    ``rows`` have uint8 [3, H, W], the truth and the estimate in metres, float32 [H, W], and the valid pixels, bool
    [H, W]; pixels that are not valid are grey in truth and error. Truth and estimate share their colours.
    """
    tallest = max((image.shape[1] / image.shape[2] for image, *_ in rows), default=1.0)
    figure = blank_figure(11.5, (2.6 * min(tallest, 3.0) + 0.3) * len(rows) + 0.5, title)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for number, (image, truth, found, valid) in enumerate(rows):
        known = truth[valid]
        limits = min(float(known.min()), float(found.min())), max(float(known.max()), float(found.max()))
        show_image(axes[number][0], image)
        show_depth(axes[number][1], truth, limits, valid)
        show_depth(axes[number][2], found, limits)
        error = (found - truth).abs()
        show_depth(axes[number][3], error, (0.0, float(error[valid].max())), valid, ERROR_COLOURS)
        heads = (
            titles[number] if titles else "image",
            "truth (m)",
            "estimate (m)",
            f"error {error[valid].mean():.2f} m",
        )
        for axis, head in zip(axes[number], heads, strict=True):
            axis.set_title(head, fontsize=9, parse_math=False)
    return figure


def show_depth(
    axis: "Axes", values: Tensor, limits: tuple[float, float], valid: Tensor | None = None, colours: str = COLOURS
) -> None:
    """Distances float [H, W] in colours between ``limits``, with a colour bar; others than the ``valid`` ones grey."""
    from matplotlib import colormaps

    shown = np.ma.masked_array(values.numpy(), False if valid is None else ~valid.numpy())
    drawn = axis.imshow(shown, colormaps[colours].with_extremes(bad=UNKNOWN), vmin=limits[0], vmax=limits[1])
    figure = axis.figure
    figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.04).ax.tick_params(labelsize=7)
    axis.axis("off")


def estimate_figure(image: Tensor, depth: Tensor) -> "Figure":
    """An image, uint8 [3, H, W], beside its depth in metres, float32 [H, W]."""
    figure = blank_figure(10, 5 * min(image.shape[1] / image.shape[2], 3.0) + 0.4, "")
    left, right = figure.subplots(1, 2)
    show_image(left, image)
    show_depth(right, depth, (float(depth.min()), float(depth.max())))
    right.set_title("depth (m)", fontsize=9)
    return figure


def samples_with_depth(samples: Sequence[Sample], depth_range: DepthRange, title: str) -> "Figure":
    """The images of ``samples`` beside their depth maps, without unreadable ones.

    Raises:
        DataError: none is readable.
    """
    reader = DepthReader(size=None, depth_range=depth_range)
    rows, reason = [], "there are none"
    for sample in samples:
        try:
            rows.append(reader.read(sample))
        except UnreadableSample as error:
            reason = str(error)
    if not rows:
        raise DataError(f"none of {len(samples)} samples is readable; the last one: {reason}")
    lines = -(-len(rows) // 2)
    figure = blank_figure(11, 2.9 * lines + 0.4, title)
    axes = figure.subplots(lines, 4, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    for number, row in enumerate(rows):
        known = row["depth"][row["valid"]]
        show_image(axes[2 * number], row["image"])
        show_depth(axes[2 * number + 1], row["depth"], (float(known.min()), float(known.max())), row["valid"])
    return figure
