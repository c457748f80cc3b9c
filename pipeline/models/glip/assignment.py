"""Anchors, and which of them are trained on which box: ATSS.

Zhang, Chi, Yao, Lei, Li, 2020, "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
Sample Selection", arXiv 1912.02424, with GLIP's values. There is one square anchor at the middle of each cell, with a
side of 8 cells. For every box, the 9 anchors of each level whose centres are nearest to its own are candidates. Those
with an overlap of at least the candidates' mean plus standard deviation, and with their centre inside of the box, are
positive. An anchor that is positive for several boxes is trained on the one that it overlaps most.

Boxes are continuous: x2 is the right edge. The authors' boxes name the last pixel, which is ``x2 - 1``, and their code
adds 1 to every width; anchors, offsets and overlaps are the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INSIDE = 0.01  # pixels by which a centre has to be inside of a box


@dataclass(frozen=True)
class Anchors:
    """``boxes`` float32 [N, 4], x1, y1, x2, y2 in pixels, level by level and row by row; ``counts`` is the number of
    anchors of each level."""

    boxes: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """Of each anchor of each image: ``positive`` bool [B, N], and the number of its box ``matched`` int64 [B, N], 0
    where it has none."""

    positive: Tensor
    matched: Tensor


def make_anchors(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], scale: float, device: torch.device
) -> Anchors:
    """The anchors of levels with ``sizes`` (rows, columns) and cells of ``strides`` pixels; a side is ``scale``."""
    found = []
    for (rows, columns), stride in zip(sizes, strides, strict=True):
        y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * stride
        x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * stride
        centres = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1).flatten(0, 1)
        half = scale * stride / 2
        found.append(torch.cat([centres - half, centres + half], dim=1))
    return Anchors(torch.cat(found), tuple(len(level) for level in found))


@torch.no_grad()
def assign(anchors: Anchors, boxes: Tensor, real: Tensor, candidates: int = 9) -> Assignment:
    """Match anchors with ``boxes`` [B, G, 4], those with ``real`` bool [B, G]; G is at least 1."""
    centres = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    chosen = _nearest(centres, anchors.counts, (boxes[..., :2] + boxes[..., 2:]) / 2, candidates)
    overlap = overlaps(anchors.boxes[chosen], boxes[:, :, None])
    # With a single candidate there is no deviation, which torch would give as NaN.
    spread = overlap.std(dim=-1, keepdim=True) if overlap.shape[-1] > 1 else torch.zeros_like(overlap)
    enough = overlap >= overlap.mean(dim=-1, keepdim=True) + spread
    middle = centres[chosen]
    edges = torch.cat([middle - boxes[:, :, None, :2], boxes[:, :, None, 2:] - middle], dim=-1)
    positive = enough & (edges.amin(dim=-1) > INSIDE) & real[:, :, None]
    best = overlap.new_full((*boxes.shape[:2], len(centres)), -1.0)
    best.scatter_(2, chosen, torch.where(positive, overlap, -1.0))
    most, matched = best.max(dim=1)
    return Assignment(most >= 0, torch.where(most >= 0, matched, 0))


def _nearest(centres: Tensor, counts: Sequence[int], middle: Tensor, candidates: int) -> Tensor:
    """int64 [B, G, K]: the anchors of each level that are nearest to the boxes' middles [B, G, 2]."""
    found, first = [], 0
    for count in counts:
        distance = (middle[:, :, None] - centres[first : first + count]).square().sum(dim=-1)
        found.append(distance.topk(min(candidates, count), dim=-1, largest=False).indices + first)
        first += count
    return torch.cat(found, dim=-1)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4], element by element; 0 for boxes without area."""
    shared, union = shared_and_union(first, second)
    return shared / union.clamp(min=1e-9)


def shared_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The areas of the intersection and of the union of boxes [..., 4], element by element."""
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(some[..., 2:] - some[..., :2]).clamp(min=0).prod(dim=-1) for some in (first, second)]
    return shared, areas[0] + areas[1] - shared
