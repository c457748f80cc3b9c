"""Segments of an image's windows, scored by words, and their means for each pixel (GroupViT, section 4.2).

A window stores the segment of each of its pixels, and the scores of its segments, not the scores of its pixels. Those
are made a strip of rows at a time, so the scores of all words for all pixels never exist at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.loaders.images import resize
from pipeline.models.groupvit.network import Grouped, hard_assignment
from pipeline.models.segments import STRIP, Segmentation, stretched_rows, strips

LONGEST = 2048
"""Longer side of a resized image in pixels; limits the work for a very wide image."""


@dataclass(frozen=True)
class GroupedWindow:
    """A window of an image at ``top``, ``left``.

    ``segments`` int64 [h, w] are the segments of its pixels, ``scores`` float32 [G, N] those of its segments for N
    words, 0 to 1.
    """

    top: int
    left: int
    segments: Tensor
    scores: Tensor


@dataclass(frozen=True)
class GroupedView:
    """The windows of an image of ``height`` x ``width`` pixels, which together cover it."""

    height: int
    width: int
    windows: Sequence[GroupedWindow]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last``, float32 [N + 1, rows, width]: mean scores over windows, then the mean of the
        windows' highest scores."""
        words = self.windows[0].scores.shape[1]
        total = self.windows[0].scores.new_zeros(words + 2, last - first, self.width)
        for window in self.windows:
            height, width = window.segments.shape
            low, high = max(first, window.top), min(last, window.top + height)
            if low < high:
                place = total[:, low - first : high - first, window.left : window.left + width]
                place[:words] += window.scores.T[:, window.segments[low - window.top : high - window.top]]
                place[words] += window.scores.max()
                place[words + 1] += 1
        return total[:-1] / total[-1]


def best_of_views(views: Sequence[GroupedView], height: int, width: int, most: int = STRIP) -> Segmentation:
    """The word with the highest mean score of every pixel of ``height`` x ``width``."""
    words = views[0].windows[0].scores.shape[1]
    labels, scores, limits = torch.empty(height, width, dtype=torch.int16), *torch.empty(2, height, width).unbind()
    for first, last in strips(height, width * (words + 1), most):
        mean = torch.stack([_resized_rows(view, first, last, height, width) for view in views]).mean(dim=0).cpu()
        best, found = mean[:-1].max(dim=0)
        labels[first:last], scores[first:last], limits[first:last] = found.to(torch.int16), best, mean[-1]
    return Segmentation(labels, scores, limits)


def _resized_rows(view: GroupedView, first: int, last: int, height: int, width: int) -> Tensor:
    """Rows ``first`` to ``last`` of ``height``, float32 [N + 1, rows, width]."""
    low, high = (int(max((row + 0.5) * (view.height / height) - 0.5, 0)) for row in (first, last - 1))
    some = view.rows(low, end := min(high + 2, view.height))
    assert end > low
    return stretched_rows(some, first, last, height, width, start=low, stored=view.height, aligned=False)


def segment_scores(segments: Tensor, image: Tensor, vectors: Tensor, scale: Tensor, top: int) -> Tensor:
    """Scores float32 [B, G, N] of the unit segments [B, G, D] for the words' unit ``vectors`` [N, D].

    The softmax over all words times the softmax over the ``top`` words of the whole window, whose unit feature is
    ``image`` [B, D]; 0 for other words.
    """
    logits = scale * segments @ vectors.T
    best = (image @ vectors.T).topk(min(top, len(vectors)), dim=1).indices
    likely = torch.zeros(len(image), len(vectors), dtype=torch.bool, device=image.device).scatter_(1, best, True)
    among = logits.masked_fill(~likely[:, None], -torch.inf).softmax(dim=2)
    return logits.softmax(dim=2) * among


def assignment_maps(grouped: Grouped, rows: int, chain: Literal["soft", "hard"]) -> list[Tensor]:
    """The assignment of every patch to the segments of each stage, float32 [B, S, rows, columns]."""
    found: list[Tensor] = []
    for logits in grouped.logits:
        own = hard_assignment(logits) if chain == "hard" else logits.softmax(dim=1)
        found.append(own @ found[-1] if found else own)
    return [one.unflatten(2, (rows, -1)) for one in found]


def largest_segment(maps: Tensor, height: int, width: int) -> Tensor:
    """The segment with the largest assignment in ``maps`` [S, h, w] of every pixel, int16 [height, width]."""
    found = torch.empty(height, width, dtype=torch.int16)
    for first, last in strips(height, width * len(maps), STRIP):
        some = stretched_rows(maps, first, last, height, width, aligned=False)
        found[first:last] = some.argmax(dim=0).to(torch.int16).cpu()
    return found


def segments_of_windows(
    grouped: Grouped, height: int, width: int, patch: int, chain: Literal["soft", "hard"]
) -> Tensor:
    """The last segment of every pixel of windows of this size, int64 [B, height, width]."""
    maps = assignment_maps(grouped, height // patch, chain)[-1]
    return functional.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False).argmax(dim=1)


def resized(image: Tensor, patch: int, *, shorter: float, longer: float | None = None) -> Tensor:
    """uint8 [3, H, W] with a ``shorter`` side of so many pixels, or a ``longer`` one; sides are multiples of ``patch``.

    A shorter side of very wide images is less, because the longer one has at most :data:`LONGEST` pixels.
    """
    short, long = sorted(image.shape[1:])
    factor = min(shorter / short, max(LONGEST, shorter) / long) if longer is None else longer / long
    height, width = (max(1, round(side * factor / patch)) * patch for side in image.shape[1:])
    return resize(image.permute(1, 2, 0).cpu().numpy(), (height, width), "bilinear")


def batches(places: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    """``places`` in pieces of at most ``size``."""
    for start in range(0, len(places), size):
        yield places[start : start + size]
