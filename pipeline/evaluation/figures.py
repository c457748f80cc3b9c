"""Figures of what a model does: a similarity matrix, retrieval examples, images with what was found in them.

They are made as those of :mod:`pipeline.loaders.sample_figures`: without global state, and with captions as plain text.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pipeline.loaders.sample_figures import FONT, blank_figure, readable, show_image, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.loaders.grid import CellAttention

TICK, CROSS = "\u2713", "\u2717"
RIGHT, WRONG = "#1a7f37", "#b3261e"
MATRIX_SIDE = 24


def image_grid(images: Sequence[Tensor], captions: Sequence[str], columns: int = 4, title: str = "") -> "Figure":
    """Images of any sizes, each uint8 ``[3, H, W]``, large enough to read text in them."""
    rows = -(-len(images) // columns)
    figure = blank_figure(4.4 * columns, 4.6 * rows + 0.5, title)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(images) :]:
        axis.axis("off")
    for axis, image, caption in zip(axes, images, captions, strict=False):
        show_image(axis, image)
        axis.set_title(readable(caption), fontsize=9, parse_math=False)
    return figure


def attention_grid(
    images: Sequence[Tensor], attention: Sequence["CellAttention"], captions: Sequence[str], title: str = ""
) -> "Figure":
    """Images, each uint8 ``[3, H, W]``, beside themselves under the attention to their cells; up to two in a row."""
    columns = min(2, len(images))
    rows = -(-len(images) // columns)
    figure = blank_figure(7.0 * columns, 3.8 * rows + 0.5, title)
    axes = figure.subplots(rows, 2 * columns, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    pairs = zip(axes[::2], axes[1::2], images, attention, captions, strict=False)
    for plain, seen, image, one, caption in pairs:
        show_image(plain, image)
        plain.set_title(wrapped(caption, 44, 2), fontsize=9, parse_math=False)
        height, width = image.shape[1:]
        show_image(seen, image)
        bottom, right = one.weights.shape[0] * one.cell[0], one.weights.shape[1] * one.cell[1]
        seen.imshow(one.weights.numpy(), extent=(-0.5, right - 0.5, bottom - 0.5, -0.5), cmap="magma", alpha=0.65)
        seen.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        seen.set_title(f"attention (highest of a cell: {float(one.weights.max()):.3f})", fontsize=9)
    return figure


def similarity_matrix(images: Sequence[Tensor], captions: Sequence[str], scores: Tensor, title: str = "") -> "Figure":
    """Cosine similarity of every image (column) with every caption (row) of a batch; matching pairs on the diagonal.

    ``images`` are N times uint8 ``[3, H, W]``, ``scores`` ``[N, N]`` with images first; at most 24 pairs are drawn.
    """
    count = min(len(images), MATRIX_SIDE)
    values = scores[:count, :count].float().cpu().numpy().T
    figure = blank_figure(5 + 0.5 * count, 1.7 + 0.5 * count, title)
    figure.set_layout_engine("compressed")  # the plain one forgets that the cells are square, and cuts the captions
    axis = figure.subplots()
    drawn = axis.imshow(values, cmap="viridis")
    axis.set_yticks(range(count), [wrapped(text, 34, 2) for text in captions[:count]], fontsize=8)
    for label in axis.get_yticklabels():
        label.set_parse_math(False)
    axis.set_xticks([])
    _write_cells(axis, values)
    for column in range(count):
        image = images[column].cpu().numpy().transpose(1, 2, 0)
        axis.imshow(image, extent=(column - 0.46, column + 0.46, -0.6, -1.52))
    axis.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -1.55))
    axis.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axis, label="cosine similarity", shrink=0.6)
    return figure


def _write_cells(axis: "Axes", values: "np.ndarray[Any, Any]") -> None:
    """The number in every cell, in a contrasting colour; matching pairs bold and outlined."""
    from matplotlib.patches import Rectangle

    plain = np.nan_to_num(values)
    middle = (plain.min() + plain.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if value < middle else "black"
        weight = "bold" if row == column else "normal"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7, weight=weight)
        if row == column:
            axis.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.5))


def retrieval_examples(
    images: Sequence[Tensor],
    captions: Sequence[str],
    scores: Tensor,
    queries: int = 6,
    top: int = 3,
    title: str = "",
    noun: str = "image",
) -> "Figure":
    """The ``top`` retrieved images for some captions, and retrieved captions for as many images; correct ones green.

    ``images`` are N times uint8 ``[3, H, W]``, or pictures of what ``noun`` says. ``scores`` are ``[N, N]`` with images
    first; pair ``i`` is ``(i, i)``, and equal captions are equally correct.
    """
    queries = min(queries, len(images))
    scores = scores.float().cpu()
    figure = blank_figure(2.2 * (top + 1) + 6, 2.2 * queries + 0.8, title)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(2.2 * (top + 1), 6))[0]
    left.suptitle(f"caption \u2192 {noun}s", fontsize=11)
    right.suptitle(f"{noun} \u2192 captions", fontsize=11)
    _images_found(left.subplots(queries, top + 1, squeeze=False), images, captions, scores, top)
    _captions_found(right.subplots(queries, 2, squeeze=False, width_ratios=(1, 1.9)), images, captions, scores, top)
    return figure


def _images_found(
    axes: "np.ndarray[Any, Any]", images: Sequence[Tensor], captions: Sequence[str], scores: Tensor, top: int
) -> None:
    for query, row in enumerate(axes):
        row[0].axis("off")
        _text(row[0], 0.98, 0.5, wrapped(captions[query], 26, 7), ha="right", va="center", fontsize=9)
        order = scores[:, query].argsort(descending=True, stable=True)
        for axis, found in zip(row[1:], order[:top].tolist(), strict=False):
            show_image(axis, images[found])
            _frame(axis, captions[found] == captions[query])
            axis.set_xlabel(f"{float(scores[found, query]):.2f}", fontsize=8, labelpad=2)
        rank = next(place for place, found in enumerate(order.tolist(), 1) if captions[found] == captions[query])
        row[1].set_title(f"right one: rank {rank}", fontsize=8, pad=3, loc="left")
        for axis in row[1 + len(order[:top]) :]:
            axis.axis("off")


def _captions_found(
    axes: "np.ndarray[Any, Any]", images: Sequence[Tensor], captions: Sequence[str], scores: Tensor, top: int
) -> None:
    # Equal captions would fill the list with one text, so each text is listed once.
    first = {text: place for place, text in reversed(list(enumerate(captions)))}
    places = sorted(first.values())
    for query, (image, words) in enumerate(axes):
        show_image(image, images[query])
        words.axis("off")
        order = sorted(places, key=lambda place: -float(scores[query, place]))
        for line, found in enumerate(order[:top]):
            right = captions[found] == captions[query]
            text = f"{float(scores[query, found]):.2f}  {TICK if right else CROSS}  "
            lines = wrapped(captions[found], 44, 2).replace("\n", "\n" + " " * 15)
            height = 1 - (line + 0.5) / top
            _text(words, 0, height, text + lines, va="center", fontsize=9.5, color=RIGHT if right else WRONG)


def _text(axis: "Axes", x: float, y: float, text: str, **style: Any) -> None:
    axis.text(x, y, text, transform=axis.transAxes, family=FONT, parse_math=False, **style)


def _frame(axis: "Axes", right: bool) -> None:
    for spine in axis.spines.values():
        spine.set(color=RIGHT if right else WRONG, linewidth=3 if right else 1)
