"""The inside of closed paths: the part of each pixel that they cover, exact for their chords.

The winding number of a point is the number of signed crossings of the path on the ray to its left. Its mean over a
pixel is a sum over chords: a chord that goes down by dy through the pixel's row adds dy times the mean width of the
pixel to the right of it. Each sum differs from that of the pixel on the left only near chords. So those differences
are summed at few pixels, and a running sum along the row gives all. Slopes with respect to points are exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.generation.curves import Chords, rows


@dataclass(frozen=True)
class Covered:
    """Pixels that paths cover: ``owner`` and ``pixel`` (y * width + x), int64 [n], and ``coverage``, float [n]."""

    owner: Tensor
    pixel: Tensor
    coverage: Tensor


def cover_inside(chords: Chords, paths: int, height: int, width: int, even_odd: bool) -> Covered:
    """What the closed paths of ``chords`` cover; a path that overlaps itself follows SVG's rule nonzero or evenodd."""
    box = _Boxes.of(chords, paths, height, width)
    row_of, row = _expand(*_whole(chords.start[:, 1], chords.end[:, 1], height))
    down, x_in, x_out = _through_rows(rows(chords.start, row_of), rows(chords.end, row_of), row)
    first, last = _whole(x_in, x_out, width)
    # The chord's last pixel is followed by one where the difference ends; a chord beyond the right edge has that alone.
    piece, column = _expand(first, torch.minimum(last + 1, torch.full_like(last, width)))
    down, x_in, x_out = (rows(one, piece) for one in (down, x_in, x_out))
    difference = _differences(column, down, x_in, x_out, width)
    owner = chords.owner[row_of][piece]
    place = box.place(owner, row[piece], column)
    # All rows are one running sum: each row's differences sum to 0, in float64 to 1e-12.
    winding = difference.new_zeros(box.cells).double().index_add(0, place, difference.double()).cumsum(0)
    covered = _even_odd(winding) if even_odd else winding.abs().clamp(max=1)
    kept = (covered.detach() > 1e-6).nonzero()[:, 0]
    owner, row, column = box.back(kept)
    inside = column < width
    kept, owner, row, column = (one[inside] for one in (kept, owner, row, column))
    return Covered(owner, row * width + column, rows(covered, kept).to(difference.dtype))


@dataclass(frozen=True)
class _Boxes:
    """The pixels around each path as one array, row by row; a column after the last takes what ends beyond it."""

    start: Tensor
    """int64 [paths + 1], first cell of each path."""
    top: Tensor
    left: Tensor
    columns: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, chords: Chords, paths: int, height: int, width: int) -> "_Boxes":
        """Boxes of all chords of a path, cut at the canvas."""
        owner = chords.owner[:, None].expand(-1, 2)
        both = torch.stack([chords.start, chords.end])
        limits = torch.tensor([width, height], dtype=both.dtype, device=both.device)
        low = both.new_full((paths, 2), torch.inf).scatter_reduce(0, owner, both.amin(0), "amin")
        high = both.new_full((paths, 2), -torch.inf).scatter_reduce(0, owner, both.amax(0), "amax")
        left, top = low.clamp(min=torch.zeros_like(limits), max=limits).floor().long().unbind(1)
        right, bottom = torch.minimum(high.clamp(min=torch.zeros_like(limits)).floor() + 1, limits).long().unbind(1)
        columns, rows = right - left + 1, (bottom - top).clamp(min=0)
        columns = torch.where(rows > 0, columns.clamp(min=1), 0)
        start = torch.zeros(paths + 1, dtype=torch.long, device=both.device)
        start[1:] = (columns * rows).cumsum(0)
        return cls(start, top, left, columns)

    @property
    def cells(self) -> int:
        """Length of the array."""
        return int(self.start[-1])

    def place(self, owner: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Positions in the array."""
        inner = torch.minimum(column - self.left[owner], self.columns[owner] - 1)
        return self.start[owner] + (row - self.top[owner]) * self.columns[owner] + inner

    def back(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Path, row and column of positions."""
        owner = torch.searchsorted(self.start, place, right=True) - 1
        local, columns = place - self.start[owner], self.columns[owner]
        row = local // columns
        return owner, self.top[owner] + row, self.left[owner] + local - row * columns


@torch.no_grad()
def _whole(one: Tensor, other: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The first and the last whole pixel, 0 to ``limit`` - 1, that ranges between ``one`` and ``other`` touch.

    A range beyond the end has ``limit`` as its first, one before the start -1 as its last.
    """
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    return low.floor().clamp(0, limit).long(), high.floor().clamp(-1, limit - 1).long()


@torch.no_grad()
def _expand(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Every whole number of ranges ``first`` to ``last``, int64 [C]: the range of each, and the number, int64 [n]."""
    counts = (last - first + 1).clamp(min=0)
    index = torch.repeat_interleave(counts)
    inner = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[index]
    return index, first[index] + inner


def _through_rows(start: Tensor, end: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far each chord goes down within its row, and its x where it enters and leaves."""
    top = row.to(start.dtype)
    enters = torch.minimum(torch.maximum(start[:, 1], top), top + 1)
    leaves = torch.minimum(torch.maximum(end[:, 1], top), top + 1)
    height, width = (end - start).unbind(1)[::-1]
    level = height == 0
    slope = torch.where(level, 0, width / torch.where(level, 1, height))
    x_in = torch.where(level, start[:, 0], start[:, 0] + (enters - start[:, 1]) * slope)
    x_out = torch.where(level, end[:, 0], start[:, 0] + (leaves - start[:, 1]) * slope)
    return leaves - enters, x_in, x_out


def _differences(column: Tensor, down: Tensor, x_in: Tensor, x_out: Tensor, width: int) -> Tensor:
    """What a piece adds to the winding number of a pixel more than to that of the pixel on its left."""
    here = _right_of(column + 1, x_in, x_out)
    # The column after the last one takes the rest, so that the row's sum is `down`; the first one has none on its left.
    here = torch.where(column == width, 1, here)
    return down * (here - torch.where(column == 0, 0, _right_of(column, x_in, x_out)))


def _right_of(edge: Tensor, x_in: Tensor, x_out: Tensor) -> Tensor:
    """Mean width, 0 to 1, of the pixel with this right ``edge`` to the right of a piece: of clamp(edge - x, 0, 1)."""
    edges = edge.to(x_in.dtype)
    wide = x_out - x_in
    is_steep = wide.abs() < torch.finfo(wide.dtype).eps ** 0.5
    mean = (_integral(edges - x_in) - _integral(edges - x_out)) / torch.where(is_steep, 1, wide)
    return torch.where(is_steep, (edges - (x_in + x_out) / 2).clamp(0, 1), mean)


def _integral(x: Tensor) -> Tensor:
    """The integral of clamp(x, 0, 1) from minus infinity."""
    return (x.clamp(min=0) ** 2 - (x - 1).clamp(min=0) ** 2) / 2


def _even_odd(winding: Tensor) -> Tensor:
    """1 at odd numbers, 0 at even ones, straight lines between."""
    return (winding - 2 * (winding.detach() / 2).round()).abs()
