"""The results of a detector, and the interface of all detectors."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.shards.objects import names_of, plain_word


class PastedMasks:
    """Masks on grids over boxes, and their pixels in the image; the base of the results that have them."""

    boxes: Tensor
    scores: Tensor
    masks: Tensor | None

    def __len__(self) -> int:
        return len(self.scores)

    def whole_masks(self, height: int, width: int, first: int = 0, last: int | None = None) -> Tensor:
        """Bool [k, height, width]: the masks of the objects ``first`` to ``last`` in an image of this size.

        A thousand masks may not fit in memory, so request them in parts.
        """
        some = range(len(self))[first:last]
        whole = torch.zeros(len(some), height, width, dtype=torch.bool)
        for target, place in zip(whole, some, strict=True):
            rows, columns, mask = self.mask_in(place, height, width)
            target[rows, columns] = mask
        return whole

    def mask_in(self, place: int, height: int, width: int) -> tuple[slice, slice, Tensor]:
        """The rows and columns of an image of this size that the object at ``place`` may cover, and its mask there,
        bool [rows, columns]."""
        require(self.masks is not None, "masks", None, "a method that predicts masks")
        x1, y1, x2, y2 = self.boxes[place].tolist()
        rows, y = _pixels(y1, y2, height)
        columns, x = _pixels(x1, x2, width)
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        if not grid.numel():
            return rows, columns, torch.zeros(len(y), len(x), dtype=torch.bool)
        mask = cast(Tensor, self.masks)[place]
        values = functional.grid_sample(mask[None, None].float(), grid[None], align_corners=False)
        return rows, columns, values[0, 0] >= 0.5


@dataclass(frozen=True)
class Detections(PastedMasks):
    """The objects detected in one image, sorted by score, on the CPU.

    ``boxes`` are x1, y1, x2, y2 in pixels of the input image, clipped to it, float32 [n, 4]; ``scores`` float32 [n],
    0 to 1; ``labels`` int64 [n], indices into the requested words. ``masks``, if the method has them, are
    probabilities on a grid over each box, float32 [n, m, m]; :meth:`whole_masks` pastes them into the image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


def _pixels(low: float, high: float, length: int) -> tuple[slice, Tensor]:
    """The pixels of a side with centres between ``low`` and ``high``, and these centres scaled to -1 to 1.

    Torchvision's pasting counts a box from its first pixel to its last, which makes masks a pixel too large.
    """
    centres = torch.arange(length) + 0.5
    first, last = int((centres < low).sum()), int((centres <= high).sum())
    return slice(first, max(first, last)), (centres[first:last] - low) / max(high - low, 1e-9) * 2 - 1


class Detector(Protocol):
    """A method that detects objects by their names."""

    def predict(
        self, images: Sequence[Tensor], words: Sequence[str], base: Collection[str] | None = None
    ) -> list[Detections]:
        """The detections in ``images``, uint8 [3, H, W] of any sizes, on the method's device or the CPU.

        ``words`` are any class names; ``couch; sofa`` are synonyms of one class. ``base`` are the words that the method
        was trained on, for methods that score these differently; by default those among its training classes.

        Raises:
            SettingError: no words, a duplicate word (see :func:`check_words`), or a ``base`` word that is not in
            ``words``.
        """
        ...


@dataclass(frozen=True)
class GroundedBoxes(PastedMasks):
    """The boxes of the phrases of one caption in its image, sorted by score, on the CPU.

    ``boxes`` are x1, y1, x2, y2 in pixels of the input image, clipped to it, float32 [n, 4]; ``scores`` float32 [n],
    0 to 1; ``spans`` int64 [n], indices into the requested spans. ``masks`` are as in :class:`Detections`.
    """

    boxes: Tensor
    scores: Tensor
    spans: Tensor
    masks: Tensor | None = None


class Grounder(Protocol):
    """A method that locates the phrases of captions."""

    def ground(
        self, images: Sequence[Tensor], captions: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[GroundedBoxes]:
        """The boxes of the phrases of each caption, in images uint8 [3, H, W] of any sizes.

        A span is the first and the end character of a phrase in its caption, in Unicode code points, the end
        exclusive. A phrase has any number of boxes. A span without characters, outside of the caption or beyond the
        longest text has none. The result for an image does not depend on the others.
        """
        ...


def check_words(words: Sequence[str], base: Collection[str] | None = None) -> None:
    """Raise ``SettingError`` for no words, an empty word, a duplicate, or ``base`` words that are not in ``words``.

    Words that differ only in case, underscores or spaces are duplicates: a novel class that equals a base class would
    be scored twice, once as a base class and once as a novel one.
    """
    plain = [plain_word(word) for word in words]
    empty = [word for word in words if not all(map(plain_word, names_of(word)))]
    require(len(plain) >= 1 and not empty, "words", empty[:5], "one word or more, none of them empty")
    twice = sorted({word for word in plain if plain.count(word) > 1}) if len(set(plain)) < len(plain) else []
    once = "every word once, compared without case and synonyms; a novel class must not be a base class"
    require(not twice, "words", twice[:5], once)
    unknown = [] if base is None else sorted({plain_word(word) for word in base} - set(plain))
    require(not unknown, "base", unknown[:5], "some of the words")
