"""The results of a method that segments by words, its interface, and the layout of an image's views."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.segmentation import MOST_CLASSES
from pipeline.models.detections import check_words

STRIP = 1 << 22
"""Numbers of a strip's logits: 16 MB."""


@dataclass(frozen=True)
class Segmentation:
    """The word of every pixel of one image, on the CPU.

    ``labels`` are int16 [H, W], indices into the requested words, or -1 for none; ``scores`` float32 [H, W], the
    probability of the best word among all words, 0 to 1. ``limits`` float32 [H, W] are the highest thresholds that the
    method allows for each pixel, if it has a rule for them: a higher one is lowered to the limit.
    """

    labels: Tensor
    scores: Tensor
    limits: Tensor | None = None

    def below(self, threshold: float | Tensor) -> Tensor:
        """Bool [H, W]: where the probability is lower than ``threshold``, one for all pixels or one for each."""
        if self.limits is None:
            return self.scores < threshold
        return self.scores < self.limits.minimum(torch.as_tensor(threshold, dtype=self.limits.dtype))


@dataclass(frozen=True, kw_only=True)
class ImageViews:
    """The views of an image whose logits are averaged.

    An image is resized so that its longer side is ``side`` times each of ``scales``. Where it is larger than the
    ``window``, it is cut into windows whose distance is ``stride`` times their side.
    """

    side: int | None = None
    """Longer side of the resized image in pixels; none for the method's own rule."""
    window: int | None = None
    """Side of the square input in pixels; none for that of the training."""
    stride: float | None = None
    """Distance of the windows, as a part of their side, more than 0, up to 1; none for the method's own."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of the side."""
    flip: bool = False
    """Average with the mirrored image."""

    def __post_init__(self) -> None:
        for name in ("side", "window"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more, or none")
        stride = self.stride
        require(stride is None or 0 < stride <= 1, "stride", stride, "more than 0, up to 1, or none")
        fits = bool(self.scales) and all(0 < scale <= 16 for scale in self.scales)
        require(fits, "scales", self.scales, "one or more, each more than 0, up to 16")


class Segmenter(Protocol):
    """A method that segments images by words."""

    def segment(
        self, images: Sequence[Tensor], words: Sequence[str], views: ImageViews | None = None
    ) -> list[Segmentation]:
        """The word of every pixel of ``images``, uint8 [3, H, W] of any sizes, on the method's device or the CPU.

        Raises:
            SettingError: words that :func:`check_segment_words` refuses.
        """
        ...


class Grouper(Segmenter, Protocol):
    """A segmenter that first groups pixels, whatever the words are."""

    def groups(self, images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The group of every pixel of ``images``, uint8 [3, H, W] of any sizes, by stage, the coarsest stage last.

        Returns:
            For each image and stage int16 [H, W], the index of the pixel's group in the whole image, from 0.
        """
        ...


def check_segment_words(words: Sequence[str]) -> None:
    """Raise ``SettingError`` for words that ``check_words`` refuses, or for more than int16 labels can number."""
    check_words(words)
    require(len(words) <= MOST_CLASSES, "words", len(words), f"at most {MOST_CLASSES} words")


def window_starts(length: int, window: int, stride: float) -> list[int]:
    """The first pixels of the windows along a side of ``length``; the last window ends with the side.

    A shorter side has one window, which starts at 0.
    """
    step = max(1, int(window * stride))
    count = max(0, -(-(length - window) // step))
    return [min(number * step, length - window) for number in range(count + 1)] if count else [0]


def stretched_rows(
    maps: Tensor,
    first: int,
    last: int,
    height: int,
    width: int,
    start: int = 0,
    stored: int | None = None,
    aligned: bool = True,
) -> Tensor:
    """Rows ``first`` to ``last`` of ``maps`` [..., h, w] resized to ``height`` x ``width``: [..., rows, width].

    As ``torch.nn.functional.interpolate`` does, bilinear, with ``aligned`` corners or not, without the other rows.
    ``maps`` may be the rows from ``start`` on of ``stored`` rows, if those that are needed are among them.
    """
    wide = functional.interpolate(
        maps.reshape(1, -1, *maps.shape[-2:]), size=(maps.shape[-2], width), mode="bilinear", align_corners=aligned
    ).view(*maps.shape[:-1], width)
    lower, upper, part = _neighbours(first, last, stored or maps.shape[-2], height, aligned)
    above = wide.index_select(-2, (lower - start).to(maps.device))
    below = wide.index_select(-2, (upper - start).to(maps.device))
    return torch.lerp(above, below, part[:, None].to(maps))


def _neighbours(first: int, last: int, stored: int, wanted: int, aligned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rows before and after the positions ``first`` to ``last`` of ``wanted`` among ``stored`` rows, and the
    distance to the former, 0 to 1."""
    where = torch.arange(first, last, dtype=torch.float64)
    if aligned:
        where = where * ((stored - 1) / max(wanted - 1, 1))
    else:
        where = ((where + 0.5) * (stored / wanted) - 0.5).clamp(min=0)
    lower = where.floor().long().clamp(max=stored - 1)
    return lower, (lower + 1).clamp(max=stored - 1), (where - lower).float()


def strips(rows: int, numbers_per_row: int, most: int) -> Iterator[tuple[int, int]]:
    """Pieces (first, last) of ``rows`` rows, each of at most ``most`` numbers, or one row."""
    step = max(1, most // max(1, numbers_per_row))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def best_words(
    maps: Sequence[Tensor], height: int, width: int, logits: "LogitsOfRows", most: int = STRIP, aligned: bool = True
) -> Segmentation:
    """The best word of every pixel of ``height`` x ``width``, from the views' ``maps`` [C, h, w].

    The maps are resized, a strip of rows at a time, and ``logits`` makes [W, rows, width] of their mean, so that the
    logits of all words for all pixels never exist at once.
    """
    labels, scores = torch.empty(height, width, dtype=torch.int16), torch.empty(height, width)
    for first, last in strips(height, width * logits.words, most):
        sizes = [stretched_rows(one, first, last, height, width, aligned=aligned) for one in maps]
        some = torch.stack(sizes).mean(dim=0)
        best, found = logits(some).float().softmax(dim=0).max(dim=0)
        labels[first:last], scores[first:last] = found.to(torch.int16).cpu(), best.cpu()
    return Segmentation(labels, scores)


class LogitsOfRows(Protocol):
    """Makes logits of rows of maps."""

    @property
    def words(self) -> int:
        """The number of words."""
        ...

    def __call__(self, rows: Tensor) -> Tensor:
        """[C, r, w] to [W, r, w]."""
        ...
