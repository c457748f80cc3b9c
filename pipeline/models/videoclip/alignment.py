"""Overlapped positives: a text and a clip of a video that meet at one moment, without equal starts or ends.

Xu et al., 2021, VideoCLIP, arXiv 2109.14084, section 3.3, with the details of the authors' code:

1. a random caption; neighbours are added before or after it at random until the text has a random budget of tokens;
2. a random moment between the start and the end of that text;
3. a clip of a random length that grows around the moment, frame by frame, to either side at random.

All functions are pure: randomness comes in as numbers in [0, 1).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.loaders.order import RandomStream, random_bits, uniform

Draws = Iterator[float]
"""Random numbers in [0, 1)."""


class ClipPair(NamedTuple):
    """A text and a clip: ``captions`` are numbers of captions, ``frames`` of frames, ``centre`` the common moment."""

    captions: range
    frames: range
    centre: int


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Sizes of overlapped positives; the defaults are the paper's, at one frame per second."""

    budget: tuple[int, int] = (8, 64)
    """Range of the tokens from which on a text grows no further; both ends included."""
    clip_frames: tuple[int, int] = (3, 32)
    """Range of the length of a clip in frames, 1 or more; both ends included."""

    def __post_init__(self) -> None:
        for name in ("budget", "clip_frames"):
            low, high = getattr(self, name)
            require(1 <= low <= high, name, (low, high), "two numbers, 1 <= low <= high")

    def pairs(
        self,
        count: int,
        seed: int,
        epoch: int,
        number: int,
        spans: NDArray[np.float64],
        sizes: Sequence[int],
        times: NDArray[np.float32],
    ) -> list[ClipPair]:
        """``count`` pairs of one video: a pure function of (seed, epoch, number of the sample) and of the video.

        ``spans`` float64 [C, 2] are the captions' starts and ends in seconds, sorted by start; ``sizes`` their numbers
        of tokens, 1 or more; ``times`` float32 [T] are the frames' times in seconds, ascending.
        """
        # At most: caption, budget, moment, length, one coin for each token and each frame.
        width = 4 + self.budget[1] + self.clip_frames[1]
        bits = random_bits(seed, RandomStream.CLIP_PAIRS, epoch, number, count * width)
        return [self.pair(spans, sizes, times, iter(row)) for row in uniform(bits).reshape(count, width).tolist()]

    def pair(
        self, spans: NDArray[np.float64], sizes: Sequence[int], times: NDArray[np.float32], draws: Draws
    ) -> ClipPair:
        """One pair; arguments as for :meth:`pairs`."""
        first = pick(0, len(sizes) - 1, next(draws))
        captions = grow_text(sizes, first, pick(*self.budget, next(draws)), draws)
        # The frame before the text and the one after it, as the authors round seconds down and up.
        low = int(np.searchsorted(times, spans[captions.start, 0], side="right")) - 1
        high = int(np.searchsorted(times, spans[captions.stop - 1, 1], side="left"))
        centre = min(max(pick(low, max(low, high), next(draws)), 0), len(times) - 1)
        return ClipPair(captions, grow_clip(len(times), pick(*self.clip_frames, next(draws)), centre, draws), centre)


def pick(low: int, high: int, draw: float) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return low + int(draw * (high - low + 1))


def grow_text(sizes: Sequence[int], first: int, budget: int, draws: Draws) -> range:
    """The captions around caption ``first`` that together have ``budget`` tokens or more, or all captions.

    Neighbours are added to either end at random while the text has fewer tokens than the budget.
    """
    start, stop, tokens = first, first + 1, sizes[first]
    while tokens < budget and (start > 0 or stop < len(sizes)):
        if stop < len(sizes) and (start == 0 or next(draws) > 0.5):
            tokens, stop = tokens + sizes[stop], stop + 1
        else:
            start -= 1
            tokens += sizes[start]
    return range(start, stop)


def grow_clip(frames: int, length: int, centre: int, draws: Draws) -> range:
    """``length`` of ``frames`` consecutive frames around the frame ``centre``, or all frames if there are fewer.

    The first step takes the centre itself, so a clip always has it; each of the others goes to a random side.
    """
    start, stop = centre, centre + 1
    while stop - start < length and (start > 0 or stop < frames):
        if stop < frames and (start == 0 or next(draws) > 0.5):
            stop += 1
        else:
            start -= 1
    return range(start, stop)
