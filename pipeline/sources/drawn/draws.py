"""Counter-based random numbers: every sample has its own stream, independent of worker and order.

The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Its raw output
is fixed by the paper. numpy's distributions may change between versions, so they are not used.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")

PURPOSES = (
    *("scene", "render", "words", "questions", "sound", "heard", "kinds", "motion", "film", "story", "encoding"),
    *("solid", "room", "annotators"),
)
_BUFFER = 160


class Draws:
    """An endless stream of choices that is a pure function of (seed, split, index, purpose, part).

    Each purpose has its own stream: a new word in the grammar moves no object. A purpose may have several, its parts.
    """

    def __init__(self, seed: int, split: str, index: int, purpose: str, part: int = 0) -> None:
        counter = np.array([0, part, PURPOSES.index(purpose), index], dtype=np.uint64)
        key = np.array([seed, _split_key(split)], dtype=np.uint64)
        self._bits = np.random.Philox(counter=counter, key=key)
        self._numbers: list[float] = []

    def random(self) -> float:
        """A float in [0, 1) with 53 random bits."""
        if not self._numbers:
            raw = self._bits.random_raw(_BUFFER) >> np.uint64(11)
            self._numbers = (raw * 2.0**-53).tolist()
        return self._numbers.pop()

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.random()

    def chance(self, probability: float) -> bool:
        """True with ``probability``."""
        return self.random() < probability

    def integer(self, end: int) -> int:
        """An integer in [0, end)."""
        return int(self.random() * end)

    def pick(self, items: Sequence[Item]) -> Item:
        """One of ``items``, uniformly."""
        return items[int(self.random() * len(items))]

    def weighted(self, cumulative: Sequence[float]) -> int:
        """An index; ``cumulative`` holds cumulative probabilities that end at 1."""
        return min(bisect_right(cumulative, self.random()), len(cumulative) - 1)

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """``items`` in a random order (Fisher-Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.integer(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def normal(self) -> float:
        """A standard normal number (Box-Muller)."""
        return math.sqrt(-2.0 * math.log(1.0 - self.random())) * math.cos(2.0 * math.pi * self.random())

    def normals(self, count: int) -> NDArray[np.float64]:
        """``count`` standard normal numbers at once, float64; like all others, the next ones of the stream."""
        half = -(-count // 2)
        raw = self._bits.random_raw(2 * half) >> np.uint64(11)
        uniform = (raw * 2.0**-53).reshape(2, half)
        radius, angle = np.sqrt(-2.0 * np.log(1.0 - uniform[0])), 2.0 * np.pi * uniform[1]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


@cache
def _split_key(split: str) -> int:
    return int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "big")
