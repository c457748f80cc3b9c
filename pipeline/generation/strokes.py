"""Differentiable strokes: Bézier paths with width and colour, painted to pixels in plain PyTorch.

    image = render(Strokes(points=points, widths=widths, colours=colours), 224, 224)   # float [B, 3, 224, 224]
    image.mean().backward()                                                            # gradients of all four

A line's coverage of a pixel is E(w/2 - d) - E(-w/2 - d), with its width w, the distance d of the pixel's centre from
the path, and an edge E, a smooth step from 0 at -``softness`` to 1 at ``softness`` pixels. With the default it follows
the covered area of the pixel. Ends and joins are round, and a path that crosses itself covers once. Filled paths are
in :mod:`pipeline.generation.fills`. Coverage times alpha is painted over a background, path after path.

Only pixels near a path are computed: those in the boxes of its chords give the nearest chord, without gradients. Then
the distance from that chord, at the fixed place on it that is nearest, has the exact gradient (the envelope theorem).
Li, Lukáč, Gharbi, Ragan-Kelley, 2020 (Differentiable Vector Graphics Rasterization) has the task; the method differs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.generation.compose import paint
from pipeline.generation.curves import Chords, Strokes, chords_of, rows
from pipeline.generation.fills import cover_inside

SOFTNESS = 0.7
"""Half the width of an edge in pixels; the area that half planes of random directions cover rises as fast."""
AT_ONCE, AT_ONCE_ON_GPU = 1 << 18, 1 << 22
"""Pairs of a chord and a pixel that are compared at a time; about 60 bytes each."""
TINY = 1e-12


def render(
    strokes: Strokes, height: int, width: int, background: Tensor | None = None, softness: float = SOFTNESS
) -> Tensor:
    """Images float [B, 3, height, width] of the scenes, with gradients of points, widths, colours and background.

    ``background`` broadcasts to the result, such as a colour [3, 1, 1]; white by default. Colours are not clamped.
    ``softness`` in pixels, more than 0: larger values blur edges, and points further away get gradients.

    Raises:
        SettingError: points or widths that are not finite, or a size or softness out of range.
    """
    require(height >= 1 and width >= 1, "size", (height, width), "1 pixel or more a side")
    require(softness > 0, "softness", softness, "more than 0")
    for name in ("points", "widths"):
        require(bool(getattr(strokes, name).isfinite().all()), name, "numbers that are not finite", "finite numbers")
    images, paths = strokes.widths.shape
    below = strokes.points.new_ones(()) if background is None else background.to(strokes.points)
    canvas = below.expand(images, 3, height, width).permute(0, 2, 3, 1).reshape(-1, 3)
    owner, pixel, coverage = _coverage(strokes, height, width, softness)
    colour = rows(strokes.colours.flatten(0, 1), owner)
    cell = owner // max(paths, 1) * (height * width) + pixel
    painted = paint(canvas, coverage * colour[:, 3], colour[:, :3], cell, owner)
    return painted.view(images, height, width, 3).permute(0, 3, 1, 2)


def _coverage(strokes: Strokes, height: int, width: int, softness: float) -> tuple[Tensor, Tensor, Tensor]:
    """Path, pixel (y * width + x) and covered part of every pixel that a path covers; no pair twice."""
    filled = strokes.fills()
    reach = (strokes.widths.detach().clamp(min=0) / 2 + softness).where(strokes.widths > 0, 0)
    chords = chords_of(strokes, ~filled, longest=2 * reach + 8)
    near = _nearest(chords, reach.flatten(), height, width)
    distance = _distance(chords, near, width)
    half = rows(strokes.widths.flatten(), near.owner) / 2
    lines = edge(half - distance, softness) - edge(-half - distance, softness)
    if not bool(filled.any()):
        return near.owner, near.pixel, lines
    inside = cover_inside(chords_of(strokes, filled, close=True), filled.numel(), height, width, strokes.even_odd)
    both = (near.owner, inside.owner), (near.pixel, inside.pixel), (lines, inside.coverage)
    owner, pixel, coverage = (torch.cat(pair) for pair in both)
    return owner, pixel, coverage


def edge(inside: Tensor, softness: float) -> Tensor:
    """The covered part of a pixel whose centre is ``inside`` pixels within an edge: 0 to 1, with a continuous slope."""
    place = (inside / (2 * softness) + 0.5).clamp(0, 1)
    return place * place * (3 - 2 * place)


@dataclass(frozen=True)
class _Near:
    """Pixels near a path, with the nearest chord of the path: int64 [n] each."""

    owner: Tensor
    pixel: Tensor
    chord: Tensor


def _distance(chords: Chords, near: _Near, width: int) -> Tensor:
    """Distances float [n] of the pixels' centres from their chords."""
    start, end = rows(chords.start, near.chord), rows(chords.end, near.chord)
    centre = torch.stack([near.pixel % width, near.pixel // width], dim=1).to(start.dtype) + 0.5
    with torch.no_grad():
        along = end - start
        length = along.square().sum(1).clamp(min=TINY)
        part = (((centre - start) * along).sum(1) / length).clamp(0, 1)[:, None]
    apart = centre - start - part * (end - start)
    return (apart.square().sum(1) + TINY).sqrt()


@torch.no_grad()
def _nearest(chords: Chords, reach: Tensor, height: int, width: int) -> _Near:
    """All pixels whose centre is nearer to a path than its ``reach``, float [paths]; sorted by path, then pixel."""
    far = reach[chords.owner]
    low = torch.minimum(chords.start, chords.end) - far[:, None] - 0.5
    high = torch.maximum(chords.start, chords.end) + far[:, None] - 0.5
    limit = low.new_tensor([width, height])
    first = low.ceil().clamp(min=torch.zeros_like(limit), max=limit).long()
    last = high.floor().clamp(min=-torch.ones_like(limit), max=limit - 1).long()
    sizes = (last - first + 1).clamp(min=0)
    kept = ((sizes.prod(1) > 0) & (far > 0)).nonzero()[:, 0]
    boxes = _ChordBoxes(chords, kept, first[kept], last[kept], far[kept].square(), width)
    parts = [boxes.nearest(some) for some in boxes.parts()]
    if not parts:
        return _Near(kept, kept, kept)
    owner, pixel, chord = (torch.cat(one) for one in zip(*parts, strict=True))
    return _Near(owner, pixel, chord)


class _ChordBoxes:
    """Chords that reach pixels, each with the box of pixels around it."""

    def __init__(self, chords: Chords, index: Tensor, first: Tensor, last: Tensor, most: Tensor, width: int) -> None:
        self.index, self.first, self.sizes, self.width = index, first, last - first + 1, width
        self.owner, self.group = torch.unique_consecutive(chords.owner[index], return_inverse=True)
        start, along = chords.start[index], chords.end[index] - chords.start[index]
        length = along.square().sum(1, keepdim=True)
        # The offset from the chord's start to the centre of its box's first pixel, and what the distance needs.
        self.numbers = torch.cat([first + 0.5 - start, along, 1 / length.clamp(min=TINY), most[:, None]], dim=1)
        paths = len(self.owner)
        group = self.group[:, None].expand(-1, 2)
        low = first.new_full((paths, 2), 2**62).scatter_reduce(0, group, first, "amin")
        high = first.new_full((paths, 2), -1).scatter_reduce(0, group, last, "amax")
        self.low, self.box = low, high - low + 1
        self.cells = self.box.prod(1)

    def parts(self) -> list[tuple[slice, slice]]:
        """Consecutive chords and their paths, of about ``AT_ONCE`` pairs and cells, whole paths only."""
        if not len(self.index):
            return []
        pairs = torch.zeros_like(self.cells).index_add(0, self.group, self.sizes.prod(1))
        at_once = AT_ONCE if self.index.device.type == "cpu" else AT_ONCE_ON_GPU
        part = ((pairs + self.cells).cumsum(0) // at_once).cpu()
        ends = torch.unique_consecutive(part, return_counts=True)[1].cumsum(0)
        chords = torch.searchsorted(self.group, ends.to(self.group)).cpu()
        paths, index = [0, *ends.tolist()], [0, *chords.tolist()]
        return [(slice(*index[n : n + 2]), slice(*paths[n : n + 2])) for n in range(len(ends))]

    def nearest(self, part: tuple[slice, slice]) -> tuple[Tensor, Tensor, Tensor]:
        """Path, pixel and nearest chord of every pixel within reach of the paths of one part."""
        some, paths = part
        first, *others = self._divided(some)
        best, chord = self._compared(first, paths)
        for other in others:
            closer, its_chord = self._compared(other, paths)
            chord = torch.where(closer < best, its_chord, chord)
            best = torch.minimum(best, closer)
        found = (best < torch.inf).nonzero()[:, 0]
        cells = self.cells[paths]
        begin = cells.cumsum(0) - cells
        path = torch.searchsorted(begin, found, right=True) - 1
        local, low = found - begin[path], self.low[paths]
        columns = self.box[paths][path, 0]
        row = local // columns
        pixel = (low[path, 1] + row) * self.width + low[path, 0] + local - row * columns
        return self.owner[paths][path], pixel, self.index[chord[found]]

    def _divided(self, some: slice) -> list[slice]:
        """Consecutive chords of about ``AT_ONCE`` pairs each, for paths that have many more."""
        at_once = AT_ONCE if self.index.device.type == "cpu" else AT_ONCE_ON_GPU
        pairs = self.sizes[some].prod(1).cumsum(0)
        if int(pairs[-1]) <= 2 * at_once:
            return [some]
        counts = torch.unique_consecutive(pairs // at_once, return_counts=True)[1]
        ends = [some.start, *(some.start + counts.cumsum(0)).tolist()]
        return [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]

    def _compared(self, some: slice, paths: slice) -> tuple[Tensor, Tensor]:
        """For the cells of the boxes of ``paths``: the squared distance of the nearest of ``some`` chords within reach,
        or infinity, and the chord."""
        sizes, box, low = self.sizes[some], self.box[paths], self.low[paths]
        group = self.group[some] - paths.start
        counts = sizes.prod(1)
        pair = torch.repeat_interleave(counts)
        inner = torch.arange(len(pair), device=pair.device) - (counts.cumsum(0) - counts)[pair]
        row = inner // sizes[pair, 0]
        column = inner - row * sizes[pair, 0]
        squared = self._squared(some, pair, row, column)
        cells = self.cells[paths]
        begin = cells.cumsum(0) - cells
        offset = self.first[some] - low[group]
        origin = begin[group] + offset[:, 1] * box[group, 0] + offset[:, 0]
        within = squared < self.numbers[some][:, 5][pair]
        pair, row, column, squared = pair[within], row[within], column[within], squared[within]
        place = origin[pair] + row * box[group, 0][pair] + column
        best = squared.new_full((int(cells.sum()),), torch.inf).scatter_reduce(0, place, squared, "amin")
        # Of equally near chords the first one, so that results do not depend on the order of threads.
        ties = squared == best[place]
        chord = place.new_full(best.shape, len(self.index)).scatter_reduce(0, place[ties], pair[ties], "amin")
        return best, chord + some.start

    def _squared(self, some: slice, pair: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Squared distances of pixels, by row and column of a chord's box, from the chord."""
        x, y, along_x, along_y, inverse, _ = self.numbers[some].unbind(1)
        x, y = column + x[pair], row + y[pair]
        along_x, along_y = along_x[pair], along_y[pair]
        part = ((x * along_x + y * along_y) * inverse[pair]).clamp(0, 1)
        return (x - part * along_x).square() + (y - part * along_y).square()
