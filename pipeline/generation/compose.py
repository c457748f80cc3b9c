"""Paint sparse layers over a background, in order, with exact gradients and memory in proportion to the layers' pixels.

A layer of a pixel is its alpha a and its colour c: the pixel p becomes p + a (c - p). Pixels are grouped by how many
layers they have, so that the first layers of all pixels are painted by one operation, then the second ones, and so on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.generation.curves import rows


@dataclass(frozen=True)
class _Levels:
    """The order in which layers are painted.

    Pixels that have a layer are sorted by their number of layers, descending; level r holds the layers r of the first
    ``sizes[r]`` of them.
    """

    pixels: Tensor
    """int64 [A], the pixels with a layer."""
    order: Tensor
    """int64 [n], the layers, level by level."""
    sizes: Sequence[int]


def paint(background: Tensor, alpha: Tensor, colour: Tensor, pixel: Tensor, order: Tensor) -> Tensor:
    """Pixels float [P, 3] after layers with ``alpha`` [n] and ``colour`` [n, 3] at ``pixel``, int64 [n].

    Layers of one pixel are painted by ascending ``order``, int64 [n] from 0, in which they differ.
    """
    if not len(alpha):
        return background
    levels = _levels(pixel, order)
    painted: Tensor = _Paint.apply(background, rows(alpha, levels.order), rows(colour, levels.order), levels)
    return painted


@torch.no_grad()
def _levels(pixel: Tensor, order: Tensor) -> _Levels:
    key = pixel * (int(order.max()) + 1) + order
    by_pixel = torch.argsort(key)
    pixels, counts = torch.unique_consecutive(pixel[by_pixel], return_counts=True)
    first = counts.cumsum(0) - counts
    longest = torch.argsort(counts, descending=True, stable=True)
    pixels, first = pixels[longest], first[longest]
    # How many pixels have more than r layers: from the histogram of the counts.
    sizes = (len(counts) - torch.bincount(counts).cumsum(0))[:-1].tolist()
    layers = torch.cat([first[:size] + level for level, size in enumerate(sizes)])
    return _Levels(pixels, by_pixel[layers], sizes)


class _Paint(torch.autograd.Function):
    """:func:`paint` of layers that are sorted by level; keeps the colour below each layer."""

    @staticmethod
    def forward(ctx: Any, background: Tensor, alpha: Tensor, colour: Tensor, levels: _Levels) -> Tensor:
        below = torch.empty_like(colour)
        state, start = background[levels.pixels], 0
        for size in levels.sizes:
            part = slice(start, start + size)
            below[part] = state[:size]
            state[:size] += alpha[part, None] * (colour[part] - state[:size])
            start += size
        ctx.save_for_backward(alpha, colour, below)
        ctx.levels = levels
        return background.index_copy(0, levels.pixels, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        alpha, colour, below = ctx.saved_tensors
        levels: _Levels = ctx.levels
        state, end = incoming[0][levels.pixels], len(alpha)
        of_alpha, of_colour = torch.empty_like(alpha), torch.empty_like(colour)
        for size in reversed(levels.sizes):
            part = slice(end - size, end)
            of_alpha[part] = (state[:size] * (colour[part] - below[part])).sum(1)
            of_colour[part] = state[:size] * alpha[part, None]
            state[:size] -= of_colour[part]
            end -= size
        return incoming[0].index_copy(0, levels.pixels, state), of_alpha, of_colour, None
