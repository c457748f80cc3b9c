"""Options of the codec of videos."""

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.config import require

MOST_SECONDS = 600.0
"""The longest --video-seconds."""
MOST_RATE = 240.0
"""Largest number of frames per second."""
_MOST_PIXELS = 64_000_000


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Options of checking and encoding videos."""

    video_seconds: float = 30.0
    """Longest stored video in seconds, at most 600; of a longer one a segment is stored."""
    video_segment: Literal["start", "middle"] = "start"
    """Which segment of a longer video is stored."""
    video_size: int = 360
    """Longest shorter side in pixels, 16 to 4,320; larger videos are scaled. 0 keeps the size."""
    video_frames_per_second: float = 0.0
    """Frames per second to store, at most 240: the frames that are shown at these times; 0 keeps all frames."""
    video_quality: int = 25
    """Constant rate factor of H.264, 0 (lossless) to 51 (worst)."""
    video_key_seconds: float = 2.0
    """Largest time in seconds between two key frames of a stored video; smaller values make seeking faster and files
    larger."""
    video_max_pixels: int = 4_096 * 2_304
    """Largest number of pixels of a frame, at most 64 million; videos with more fail."""
    video_min_seconds: float = 0.1
    """Shortest stored video in seconds; shorter ones fail."""
    video_max_seconds: float = math.inf
    """Longest video in seconds before it is cut, as its header says; longer ones fail."""
    video_keep_sound: bool = False
    """Store the sound of the segment, too, as FLAC of 16 bits."""
    video_sound_rate: int = 48_000
    """Samples per second of the stored sounds, 1,000 to 192,000; 0 keeps the rate of each sound."""
    video_keep_bytes: bool = False
    """Keep the original bytes of a video that needs no change, with the ending of its own format; it is decoded once,
    to detect damage."""

    def __post_init__(self) -> None:
        allowed = f"more than 0, at most {MOST_SECONDS:,.0f} seconds"
        require(0 < self.video_seconds <= MOST_SECONDS, "video_seconds", self.video_seconds, allowed)
        require(self.video_segment in ("start", "middle"), "video_segment", self.video_segment, "start or middle")
        size, pixels = self.video_size, self.video_max_pixels
        require(size == 0 or 16 <= size <= 4_320, "video_size", size, "0, or 16 to 4,320 pixels")
        rate = self.video_frames_per_second
        require(0 <= rate <= MOST_RATE, "video_frames_per_second", rate, f"0 to {MOST_RATE:g}")
        require(0 <= self.video_quality <= 51, "video_quality", self.video_quality, "0 to 51")
        key = self.video_key_seconds
        require(0.01 <= key <= MOST_SECONDS, "video_key_seconds", key, f"0.01 to {MOST_SECONDS:,.0f} seconds")
        require(1 <= pixels <= _MOST_PIXELS, "video_max_pixels", pixels, f"1 to {_MOST_PIXELS:,}")
        shortest, longest = self.video_min_seconds, self.video_max_seconds
        require(0 <= shortest <= self.video_seconds, "video_min_seconds", shortest, "0 to video_seconds")
        require(longest > 0, "video_max_seconds", longest, "more than 0 seconds")
        sound = self.video_sound_rate
        require(sound == 0 or 1_000 <= sound <= 192_000, "video_sound_rate", sound, "0, or 1,000 to 192,000 per second")
