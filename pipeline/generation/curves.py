"""Cubic Bézier paths, and the chords by which they are computed.

A path of N curves has 3N + 1 points: each curve begins where the one before ends. Coordinates are in pixels, x to the
right and y down; the centre of the first pixel is at (0.5, 0.5), as in SVG.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import require

TOLERANCE = 0.02
"""Largest distance in pixels between a curve and its chords."""
MOST_CHORDS = 256
"""Chords of one curve; reached by curves of thousands of pixels only."""


@dataclass(frozen=True, kw_only=True)
class Strokes:
    """Paths of B images, S each, painted in order. All floating tensors share a dtype and a device.

    Raises:
        SettingError: tensors whose shapes do not fit each other.
    """

    points: Tensor
    """Control points, float [B, S, 3N + 1, 2], x and y in pixels."""
    widths: Tensor
    """Widths of lines in pixels, float [B, S]; negative ones count as 0. Not used by filled paths."""
    colours: Tensor
    """Red, green, blue and alpha, float [B, S, 4], 0 to 1."""
    segments: Tensor | None = None
    """Curves of each path, int64 [B, S], 1 to N; the points after them are not used. By default N."""
    filled: Tensor | None = None
    """Paths whose inside is painted, bool [B, S]; a straight line closes them. By default none."""
    even_odd: bool = False
    """Fill rule of paths that overlap themselves: SVG's evenodd, or nonzero."""

    def __post_init__(self) -> None:
        shape = tuple(self.points.shape)
        fits = len(shape) == 4 and shape[3] == 2 and shape[2] >= 4 and shape[2] % 3 == 1
        require(fits, "points", shape, "the shape [B, S, 3N + 1, 2] with N of 1 or more")
        for name, wanted in (("widths", shape[:2]), ("colours", (*shape[:2], 4))):
            found = tuple(getattr(self, name).shape)
            require(found == wanted, name, found, f"the shape {wanted}")
        for name in ("segments", "filled"):
            one = getattr(self, name)
            require(one is None or tuple(one.shape) == shape[:2], name, one, f"the shape {shape[:2]}")
        if self.segments is not None and self.segments.numel():
            low, high = int(self.segments.min()), int(self.segments.max())
            require(1 <= low and high <= self.most_segments, "segments", (low, high), f"1 to {self.most_segments}")

    @property
    def most_segments(self) -> int:
        """N, the curves for which the points have room."""
        return (self.points.shape[2] - 1) // 3

    def counts(self) -> Tensor:
        """``segments``, or their default: int64 [B, S]."""
        if self.segments is not None:
            return self.segments
        return torch.full(self.widths.shape, self.most_segments, dtype=torch.long, device=self.points.device)

    def fills(self) -> Tensor:
        """``filled``, or its default: bool [B, S]."""
        return torch.zeros_like(self.widths, dtype=torch.bool) if self.filled is None else self.filled


@dataclass(frozen=True)
class Chords:
    """Straight pieces of curves: ``start`` and ``end``, float [M, 2]; ``owner`` is the path b * S + s, ascending."""

    start: Tensor
    end: Tensor
    owner: Tensor


def chords_of(strokes: Strokes, chosen: Tensor, longest: Tensor | None = None, close: bool = False) -> Chords:
    """The chords of the paths that are ``chosen``, bool [B, S]; ``close`` adds the line from the end to the start.

    Chords differ from their curve by at most ``TOLERANCE``, and have at most about ``longest`` pixels, float [B, S].
    """
    counts, number = strokes.counts(), torch.arange(strokes.most_segments, device=strokes.points.device)
    curves = strokes.points.unfold(2, 4, 3).flatten(0, 2)  # [B x S x N, 2, 4]
    used = ((number < counts[..., None]) & chosen[..., None]).flatten().nonzero()[:, 0]
    owner = used // len(number)
    found = rows(curves, used)
    if close:
        found, owner = _closed(strokes, chosen, found, owner)
    limit = None if longest is None else longest.flatten()[owner]
    pieces = _pieces(found.detach(), limit)
    curve = torch.repeat_interleave(pieces)
    place = torch.arange(len(curve), device=curve.device) - (pieces.cumsum(0) - pieces)[curve]
    per_curve = pieces[curve].to(found.dtype)
    start, end = (_at(found, curve, (place + offset).to(found.dtype) / per_curve) for offset in (0, 1))
    return Chords(start, end, owner[curve])


def _closed(strokes: Strokes, chosen: Tensor, curves: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """With a straight curve from the end to the start of each chosen path; order within a path does not matter."""
    index = chosen.flatten().nonzero()[:, 0]
    points, last = rows(strokes.points.flatten(0, 1), index), 3 * strokes.counts().flatten()[index]
    end = points.gather(1, last[:, None, None].expand(-1, 1, 2))[:, 0]
    part = torch.arange(4, device=points.device, dtype=points.dtype) / 3
    lines = torch.lerp(end[..., None], points[:, 0, :, None], part)
    every, owners = torch.cat([curves, lines]), torch.cat([owner, index])
    by_owner = torch.argsort(owners, stable=True)
    return rows(every, by_owner), owners[by_owner]


def rows(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for an ``index`` int64 [n] that may repeat, with a gradient that is summed in a fixed order.

    The gradient of ``table[index]`` itself is summed by atomic additions of all threads, in the order of their arrival.
    """
    # Of two dimensions, since torch sums those in parallel and more of them one by one.
    picked: Tensor = table.flatten(1).index_select(0, index) if table.ndim > 1 else table.index_select(0, index)
    return picked.view(-1, *table.shape[1:])


@torch.no_grad()
def _pieces(curves: Tensor, longest: Tensor | None) -> Tensor:
    """The number of chords of each curve [C, 2, 4]: int64 [C].

    K chords of equal parameter ranges differ from the curve by at most 1 / 8 K^2 of its second derivative, which is
    6 times the second difference of the control points at most.
    """
    steps = curves.diff(dim=2)
    bend = steps.diff(dim=2).norm(dim=1).amax(dim=1)
    pieces = (0.75 / TOLERANCE * bend).sqrt()
    if longest is not None:
        pieces = torch.maximum(pieces, steps.norm(dim=1).sum(dim=1) / longest)
    counts: Tensor = pieces.clamp(1, MOST_CHORDS).ceil().long()
    return counts


def _at(curves: Tensor, index: Tensor, t: Tensor) -> Tensor:
    """Points of the curves ``index`` at the parameters ``t``, both [M]: float [M, 2]."""
    s = 1 - t
    basis = torch.stack([s**3, 3 * s**2 * t, 3 * s * t**2, t**3], dim=1)
    points: Tensor = (rows(curves, index) * basis[:, None]).sum(dim=2)
    return points
