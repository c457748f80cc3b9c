"""What a detector finds in a picture, whichever method it is, and how it is asked."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from pipeline.config import require


@dataclass(frozen=True)
class Detections:
    """The things found in one picture, the best first, on the CPU.

    ``boxes`` are x1, y1, x2, y2 in pixels of the picture as it was given, float32 [n, 4], inside it; ``scores``
    float32 [n], 0 to 1; ``labels`` int64 [n], places in the words that were asked for. ``masks``, where the method has
    them, are probabilities on a grid over each box, float32 [n, m, m]; :meth:`whole_masks` puts them into the picture.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def whole_masks(self, height: int, width: int, first: int = 0, last: int | None = None) -> Tensor:
        """Bool [k, height, width]: the masks of the things ``first`` to ``last`` in a picture of this size.

        A thousand at once may not fit in memory, so ask for some at a time.
        """
        require(self.masks is not None, "masks", None, "a method that gives masks")
        some = cast(Tensor, self.masks)[first:last]
        pasted = paste_masks_in_image(some[:, None], self.boxes[first:last], (height, width))
        return cast(Tensor, pasted[:, 0] >= 0.5)


class Detector(Protocol):
    """Every method that finds the things that words name."""

    def predict(
        self, pictures: Sequence[Tensor], words: Sequence[str], base: Collection[str] | None = None
    ) -> list[Detections]:
        """The detections in ``pictures``, uint8 [3, H, W] each of its own size, on the method's device or the CPU.

        ``words`` are any names. ``base`` are those of them that the method was trained on, where it matters how it
        knows a word; by default those that it finds among its training classes.

        Raises:
            SettingError: no words, a word twice (see :func:`check_words`), or ``base`` has another word.
        """
        ...


def plain_word(word: str) -> str:
    """``hot dog`` of ``Hot_Dog ``: names that become the same are the same class."""
    return " ".join(word.replace("_", " ").lower().split()).rstrip(".")


def check_words(words: Sequence[str], base: Collection[str] | None = None) -> None:
    """Raise ``SettingError`` for no words, an empty word, one that occurs twice or ``base`` words that do not occur.

    Case, underscores and spaces do not make another word: a novel class that equals a base class would be scored
    twice, once as what was trained and once as what was not.
    """
    plain = [plain_word(word) for word in words]
    require(len(plain) >= 1 and all(plain), "words", list(words)[:5], "one word or more, none of them empty")
    twice = sorted({word for word in plain if plain.count(word) > 1}) if len(set(plain)) < len(plain) else []
    require(not twice, "words", twice[:5], "every word once, whatever its case; a novel class is no base class")
    unknown = [] if base is None else sorted({plain_word(word) for word in base} - set(plain))
    require(not unknown, "base", unknown[:5], "some of the words")


def no_detections(mask_size: int | None = None) -> Detections:
    """Nothing found."""
    masks = None if mask_size is None else torch.zeros(0, mask_size, mask_size)
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), masks)
