"""Held-out classes one at a time: the protocol of PASCAL-5i, COCO-20i and FSS-1000.

Each image is segmented once for each of the classes that its truth has, into that class and all else. With the pixels
summed over all images of a class

    mIoU   = mean over the classes of the IoU of the class
    FB-IoU = mean over foreground and background of (sum over classes of the intersection) / (sum of the union)

as in the code of HSNet (Min et al. 2021, arXiv 2104.01538) and LSeg. They sample 1,000 pairs of a class and an image;
here every pair counts once, which is what the sample estimates. ``episodes`` gives the sampled figure: a class by
chance, then one of its images by chance, with a fixed seed, from the same counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation.encoder import inference
from pipeline.evaluation.pixel_counts import by_word, mean_of
from pipeline.evaluation.segmentation import IMAGES_AT_ONCE, SegmentationSet, labelled_images, no_pixels
from pipeline.models.segments import Segmenter
from pipeline.shards.sample import Sample

SEED = 0
OTHERS = "others"  # LSeg's word for all else


@dataclass(frozen=True)
class HeldOut:
    """A set for :func:`evaluate_held_out`: ``numbers`` are the places of the held-out classes among its words."""

    one: SegmentationSet
    numbers: tuple[int, ...]
    episodes: int = 0

    def alone(self, number: int) -> SegmentationSet:
        """The set of one class, with the word for all else."""
        ground = self.one.ground_word or OTHERS
        background = self.one.background.of_word(number)
        return replace(self.one, words=(self.one.words[number],), ground_word=ground, background=background)


def evaluate_held_out(
    model: Segmenter,
    samples: Iterable[Sample],
    asked: HeldOut,
    *,
    batch: int = IMAGES_AT_ONCE,
    threads: int = 4,
    precision: str = "fp32",
) -> dict[str, float]:
    """Segment all images for each held-out class that they have.

    Returns:
        ``miou``, ``fb_iou``, ``iou/<word>``, ``pairs`` of a class and an image, and ``samples``.

    Raises:
        DataError: no readable sample, labels for another image size, or no pixel of a held-out class.
    """
    pairs: list[tuple[int, NDArray[np.int64]]] = []
    count = 0
    for images, maps in labelled_images(samples, asked.one, batch, threads):
        for number in asked.numbers:
            having = [place for place, truth in enumerate(maps) if bool((truth == number).any())]
            with inference(model, precision):
                found = _found(model, [images[place] for place in having], asked.alone(number))
            pairs += [
                (number, binary_counts(maps[place], number, inside))
                for place, inside in zip(having, found, strict=True)
            ]
        count += len(images)
    if not pairs:
        raise no_pixels(count, [asked.one.words[number] for number in asked.numbers])
    measured = pair_metrics(pairs, asked.one.words, asked.episodes)
    return {**measured, "pairs": float(asked.episodes or len(pairs)), "samples": float(count)}


def _found(model: Segmenter, images: Sequence[Tensor], one: SegmentationSet) -> list[Tensor]:
    """Bool [H, W] for each image: where the class is predicted."""
    if not images:
        return []
    return [one.predicted(some) == 0 for some in model.segment(images, one.asked, one.views)]


def binary_counts(truth: Tensor, number: int, inside: Tensor) -> NDArray[np.int64]:
    """int64 [2, 2]: intersection and union (columns) of background and foreground (rows); void pixels are left out."""
    known = truth >= 0
    counts = []
    for wanted in (False, True):
        one, other = ((truth == number) == wanted) & known, (inside == wanted) & known
        counts.append([int((one & other).sum()), int((one | other).sum())])
    return np.array(counts, np.int64)


def pair_metrics(
    pairs: Sequence[tuple[int, NDArray[np.int64]]], words: Sequence[str], episodes: int = 0
) -> dict[str, float]:
    """The metrics of pairs of a class number and :func:`binary_counts`; of so many sampled ones with ``episodes``."""
    numbers = sorted({number for number, _ in pairs})
    by_class = {number: np.stack([counts for found, counts in pairs if found == number]) for number in numbers}
    totals = _sampled(by_class, episodes) if episodes else np.stack([one.sum(axis=0) for one in by_class.values()])
    chosen = totals[:, 1, 1] > 0
    foreground = totals[chosen, 1, 0] / totals[chosen, 1, 1]
    ground, front = totals.sum(axis=0)
    fb = np.array([one[0] / one[1] if one[1] else np.nan for one in (ground, front)])
    names = [words[number] for number, is_chosen in zip(numbers, chosen, strict=True) if is_chosen]
    return {"miou": mean_of(foreground), "fb_iou": mean_of(fb), **by_word("iou", names, foreground)}


def _sampled(by_class: dict[int, NDArray[np.int64]], episodes: int) -> NDArray[np.int64]:
    """The counts int64 [C, 2, 2] of ``episodes`` pairs."""
    random = np.random.default_rng(SEED)
    numbers = list(by_class)
    totals = np.zeros((len(numbers), 2, 2), np.int64)
    for place in random.integers(0, len(numbers), episodes):
        pairs = by_class[numbers[place]]
        totals[place] += pairs[random.integers(0, len(pairs))]
    return totals
