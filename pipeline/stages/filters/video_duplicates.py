"""Near duplicates of videos by a hash of four of their frames.

The frames at 1/8, 3/8, 5/8 and 7/8 of the length become grey images of 32 x 32. Each gives 16 of the 64 bits: the
lowest frequencies of its cosine transform but the mean, set above their median, as in
:mod:`~pipeline.stages.filters.perceptual`, which has the search. So format, size, rate and quality make little
difference; a part of a longer video is no duplicate of it. Exact duplicates are found by ``exact_duplicates``. (The
hash and the threshold are not from a paper.)
"""

from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.shards.media import VIDEO
from pipeline.stages.filters.duplicates import in_duplicates
from pipeline.stages.filters.filter import Step, Verdict
from pipeline.stages.filters.perceptual import SIDE, HashDuplicates
from pipeline.stages.filters.view import ShardView

FRAMES = 4
# Row and column of the 16 lowest frequencies without the mean, by their sum.
_LOWEST = sorted(((row, column) for row in range(6) for column in range(6) if row + column), key=sum)[:16]


@dataclass(frozen=True, kw_only=True)
class VideoDuplicates(HashDuplicates):
    """Drop videos that look like an earlier one: ``near_duplicate``. Samples without a readable video are kept."""

    name: ClassVar[str] = "video_duplicates"
    rank: ClassVar[int] = 13
    max_video_hamming: int = 6
    """Largest number of the 64 bits in which near duplicates differ."""

    def check(self) -> None:
        """Require at most a quarter of the bits; above it, most pairs match by chance."""
        require(0 <= self.max_video_hamming <= 16, "max_video_hamming", self.max_video_hamming, "0 to 16 bits")

    @property
    def distance(self) -> int:
        """``max_video_hamming``."""
        return self.max_video_hamming

    @staticmethod
    def hashes(view: ShardView) -> pa.Table:
        """The hashes of all videos that can be read."""
        bodies = zip(view.positions, view.bodies(VIDEO), strict=True)
        made = [(int(place), video_hash(body)) for place, body in bodies if body is not None]
        found = [(place, value) for place, value in made if value is not None]
        places, values = [place for place, _ in found], [value for _, value in found]
        return pa.table({"hash": np.array(values, np.uint64), "index": np.array(places, np.int32)})

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by the table of duplicates."""
        return Verdict({"near_duplicate": in_duplicates(view, step, 1)})


def video_hash(body: bytes) -> int | None:
    """64 bits of a video; ``None`` if it cannot be read."""
    from pipeline.shards.video_frames import read_frames

    try:
        frames = read_frames(
            body, lambda line: [line.end * (number + 0.5) / FRAMES for number in range(FRAMES)], size=2 * SIDE
        )
    except SampleError:
        return None
    bits = [bit for frame in frames.pixels for bit in _bits(frame)]
    return sum(int(bit) << place for place, bit in enumerate(bits))


def _bits(frame: NDArray[np.uint8]) -> NDArray[np.bool_]:
    grey = cv2.cvtColor(cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    frequencies = cv2.dct(grey.astype(np.float32))
    lowest = np.array([frequencies[place] for place in _LOWEST])
    return lowest > np.median(lowest)
