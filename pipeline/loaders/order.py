"""The order of samples: a pure function of (seed, epoch, list of shards).

An epoch permutes the shards and concatenates them: N samples in a row. The row is cut into L contiguous *lanes* of
equal length (within one), and each lane is shuffled in blocks. A lane is an endless stream: its position p belongs
to epoch p // length. The global batch number s takes the next B/L samples of every lane, lane after lane, and a rank
takes a contiguous piece of the global batch. So

- the global batches do not depend on the number of workers: a run can resume with more or fewer of them;
- every lane shows each of its samples exactly once an epoch;
- a rank reads from few shards at a time, which matters for shards in an object store;
- the position is one number, the samples seen, and resuming from it replays nothing.

Memory is O(shards + lanes x block). Randomness is sorted raw 64-bit integers from Philox: NumPy guarantees that these
stay the same in every version, unlike the methods of its generators.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require

Integers = NDArray[np.int64]

REMEMBERED_EPOCHS = 4


class RandomStream(IntEnum):
    """The streams of random numbers of a run; the numbers differ, so the streams are not correlated.

    The numbers are part of the results: another number gives another order or other crops.
    """

    SHARDS = 1
    """Order of the shards in an epoch."""
    BLOCKS = 2
    """Order of the samples in a block of a lane."""
    CROPS = 3
    """Random crop and mirroring of an image."""
    STEPS = 4
    """Seed of torch's generators in a training step."""
    FEW_SHOT_ORDER = 5
    """Order of the images in an epoch of a few-shot adaptation."""
    CHOSEN_VIEWS = 6
    """Which stored view of an image a few-shot adaptation uses in an epoch."""
    PROBE_ORDER = 7
    """Order of the images in an epoch of a linear probe."""
    HELD_OUT = 8
    """Which training images a linear probe holds out for validation."""
    PLACEMENTS = 9
    """Large-scale jitter of a detector's image."""
    DRAWS = 10
    """Which anchors and regions of an image the loss of a detector samples."""
    LABELS = 11
    """Which labels the pixels of an image are compared with."""
    PROMPT_WORDS = 14
    """Words and templates of a caption's prompts."""
    AUGMENTATION = 13
    """RandAugment and erasing of an image."""
    GROUPS = 12
    """Seed of the noise with which an image's patches are grouped."""
    PARTS = 16
    """Seeds of the snapshots of a mixture."""
    PROMPTS = 20
    """Which classes or captions are in the prompt of an image, and their order."""
    CAPTION_POOL = 21
    """Which captions of a data set are negatives of other images."""
    MASKED_TOKENS = 30
    """Which tokens of a text are masked or replaced."""
    MASK_BOXES = 31
    """How far the box around a mask is moved."""
    TEXTS = 32
    """Which caption or question of an image is read."""
    SOUND_CROPS = 33
    """Random segment of a sound."""
    FRAMES = 34
    """Which frames of a video are read."""
    SOUNDS = 40
    """Augmentation of a sound."""
    POINTS = 41
    """Which points of a cloud are read."""
    CLIP_PAIRS = 50
    """Which texts and clips of a video are pairs."""
    RETRIEVED = 51
    """Which videos are queries of an epoch's batches, and which of their neighbours are read."""
    CELLS = 60
    """Which cells of an image's grid of features a step reads."""
    MATCHED_TEXTS = 61
    """Which images are paired with another image's text."""
    VIEWS = 64
    """Random crops of view v of an image: 64 + v, 64 to 127."""
    COLOURS = 128
    """Random colours of view v of an image: 128 + v, 128 to 191."""


def random_bits(seed: int, stream: int, epoch: int, number: int, count: int) -> NDArray[np.uint64]:
    """``count`` random 64-bit integers: a pure function of the other arguments (each 0 to 2**64 - 1).

    ``stream`` is a :class:`RandomStream`, or one plus an offset where the stream has a range of numbers.
    """
    generator = np.random.Philox(key=[seed, int(stream)], counter=[0, 0, epoch, number])
    bits: NDArray[np.uint64] = generator.random_raw(count)
    return bits


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Random 64-bit integers as numbers in [0, 1), by their upper 53 bits."""
    found: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found


def permutation(seed: int, stream: int, epoch: int, number: int, length: int) -> Integers:
    """A permutation of ``range(length)``, a pure function of the arguments."""
    bits = random_bits(seed, stream, epoch, number, length)
    return np.argsort(bits, kind="stable").astype(np.int64)


class SampleOrder(Protocol):
    """The samples of each global batch: :class:`Order`, or another rule."""

    lanes: int
    """Positions in the data from which a batch is read."""

    def steps(self, epochs: float) -> int:
        """The number of global batches of ``epochs`` epochs."""
        ...

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Integers:
        """The rows of rank ``rank`` of ``world`` in global batch ``step``: int64 [B / world, 2] of (epoch, number)."""
        ...


class Order:
    """The samples of each global batch.

    ``shard_sizes`` are the sample counts of the snapshot's shards, in order; samples are numbered in that order.
    ``lanes`` is reduced to a divisor of the batch size (and to the number of samples, for tiny data).

    Raises:
        SettingError: no samples, or a batch size, a block or a seed out of range.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        batch_size: int,
        lanes: int = 32,
        shuffle_block: int = 8192,
    ) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "1 or more")
        require(lanes >= 1, "lanes", lanes, "1 or more")
        require(shuffle_block >= 1, "shuffle_block", shuffle_block, "1 or more")
        require(0 <= seed < 2**63, "seed", seed, "0 to 2**63 - 1")
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        require(self.samples >= 1, "shard_sizes", list(shard_sizes)[:5], "at least one sample")
        self.seed, self.batch_size, self.shuffle_block = seed, batch_size, shuffle_block
        self.lanes = _lanes(lanes, batch_size, self.samples)
        self._first = np.concatenate([[0], np.cumsum(self.sizes)])
        self._bounds = np.arange(self.lanes + 1) * self.samples // self.lanes
        self._layout = lru_cache(REMEMBERED_EPOCHS)(self._lay_out)
        self._shuffled = lru_cache(2 * self.lanes)(self._shuffle)

    def steps(self, epochs: float) -> int:
        """The smallest number of global batches in which every sample is seen ``epochs`` times."""
        longest = int(np.diff(self._bounds).max())
        return math.ceil(epochs * longest / (self.batch_size // self.lanes))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Integers:
        """The rows of rank ``rank`` of ``world`` in global batch ``step``: int64 [B / world, 2] of (epoch, number).

        Raises:
            SettingError: ``world`` does not divide the batch.
        """
        require(self.batch_size % world == 0, "batch_size", self.batch_size, f"a multiple of the {world} workers")
        per_rank, per_lane = self.batch_size // world, self.batch_size // self.lanes
        start, stop = rank * per_rank, (rank + 1) * per_rank
        pieces = []
        for lane in range(start // per_lane, (stop - 1) // per_lane + 1):
            low, high = max(start - lane * per_lane, 0), min(stop - lane * per_lane, per_lane)
            pieces.extend(self._stream(lane, step * per_lane + low, step * per_lane + high))
        return np.concatenate(pieces)

    def _stream(self, lane: int, start: int, stop: int) -> list[Integers]:
        """Positions ``start`` to ``stop`` of an endless lane, as pieces within one block each."""
        length = int(self._bounds[lane + 1] - self._bounds[lane])
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, length)
            block, inside = divmod(offset, self.shuffle_block)
            in_block = min(self.shuffle_block, length - block * self.shuffle_block)
            count = min(stop - start, in_block - inside)
            numbers = self._shuffled(epoch, lane, block, in_block)[inside : inside + count]
            pieces.append(np.stack([np.full(count, epoch), numbers], axis=1))
            start += count
        return pieces

    def _shuffle(self, epoch: int, lane: int, block: int, length: int) -> Integers:
        """The shuffled sample numbers of one block of one lane."""
        within = permutation(self.seed, RandomStream.BLOCKS, epoch, (lane << 40) + block, length)
        places = self._bounds[lane] + block * self.shuffle_block + within
        shards, ends = self._layout(epoch)
        nth = np.searchsorted(ends, places, side="right")
        shard = shards[nth]
        return np.asarray(self._first[shard] + places - (ends[nth] - self.sizes[shard]), dtype=np.int64)

    def _lay_out(self, epoch: int) -> tuple[Integers, Integers]:
        """The shards in the order of an epoch, and the end of each in the row of samples."""
        shards = permutation(self.seed, RandomStream.SHARDS, epoch, 0, len(self.sizes))
        return shards, np.cumsum(self.sizes[shards])


def _lanes(lanes: int, batch_size: int, samples: int) -> int:
    """The largest divisor of the batch size up to the requested number of lanes and the number of samples."""
    common = math.gcd(lanes, batch_size)
    return max(divisor for divisor in range(1, common + 1) if common % divisor == 0 and divisor <= samples)
