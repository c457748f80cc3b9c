"""Length, size and motion of videos.

The values are the columns that a refresh stores; where a shard lacks them, 16 frames of each video are decoded. Samples
without a video are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.shards.media import VIDEO
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.part_values import Values, part_values
from pipeline.stages.filters.view import ShardView

COLUMNS = ("video_seconds", "video_width", "video_height", "video_motion")
FRAMES, SIDE = 16, 32


@dataclass(frozen=True, kw_only=True)
class Video(Filter):
    """Drop videos: ``unreadable``, ``short``, ``long``, ``small``, ``still``."""

    name: ClassVar[str] = "video"
    rank: ClassVar[int] = 12
    min_video_seconds: float = 1.0
    max_video_seconds: float = math.inf
    min_video_side: int = 64
    """Smallest shorter side of the stored video in pixels."""
    min_motion: float = 0.003
    """Smallest mean difference of frames a quarter of a second apart, 0 to 1; slides and still images have less."""

    def check(self) -> None:
        """Require valid bounds."""
        shortest, longest = self.min_video_seconds, self.max_video_seconds
        require(shortest >= 0, "min_video_seconds", shortest, "0 or more seconds")
        require(longest > shortest, "max_video_seconds", longest, "more than min_video_seconds")
        require(self.min_video_side >= 0, "min_video_side", self.min_video_side, "0 or more pixels")
        require(0 <= self.min_motion <= 1, "min_motion", self.min_motion, "0 to 1")

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Comparisons with NaN are false, so a sample without a video has no reason."""
        values, unreadable = video_values(view)
        return Verdict(
            {
                "unreadable": unreadable,
                "short": values["video_seconds"] < self.min_video_seconds,
                "long": values["video_seconds"] > self.max_video_seconds,
                "small": np.minimum(values["video_width"], values["video_height"]) < self.min_video_side,
                "still": values["video_motion"] < self.min_motion,
            }
        )


def video_values(view: ShardView) -> tuple[Values, NDArray[np.bool_]]:
    """The values of ``COLUMNS``, float64 [n], NaN without a video; and which videos cannot be read, bool [n]."""
    return part_values(view, VIDEO, COLUMNS, _measured)


def _measured(body: bytes) -> Sequence[float]:
    """The values of a video; the motion is that between pairs of frames a quarter of a second apart."""
    import cv2

    from pipeline.shards.video_frames import read_frames, read_timeline, read_video_header

    header, line = read_video_header(body), read_timeline(body)
    starts = np.linspace(0, max(0.0, line.end - 0.25), FRAMES // 2)
    frames = read_frames(body, np.stack([starts, starts + 0.25], axis=1).ravel().tolist(), size=2 * SIDE).pixels
    small = [cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in frames]
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small]).astype(np.float64)
    motion = float(np.abs(grey[1::2] - grey[::2]).mean()) / 255
    return line.end, float(header.width), float(header.height), motion
