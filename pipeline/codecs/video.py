"""The codec of videos: a segment is decoded, scaled and stored as MP4 with H.264; its sound may be kept as FLAC."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.codecs.codec import Codec, Encoded
from pipeline.config import require
from pipeline.sources.segments import Segment

if TYPE_CHECKING:
    from pipeline.shards.video_frames import Frames

MOST_SECONDS = 600.0
"""The longest --video-seconds."""
MOST_RATE = 240.0
"""Largest number of frames per second."""
_MOST_PIXELS = 64_000_000
_SHOWN = 16  # frames that decode() gives
_SHOWN_SIZE = 256
# 17 frames of reference and those under way, with 16 bits and chroma of half the width and height.
_DECODER_BYTES = 64
# 60 frames of libx264's look-ahead and references, and the frame in RGB with 16 bits and as floats.
_ENCODER_BYTES = 160
_LIBRARIES = 512 << 20


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


class VideoCodec(Codec[VideoOptions, "Frames"]):
    """See :class:`~pipeline.codecs.codec.Codec`. All bodies are decoded in a process apart."""

    medium: ClassVar[str] = "video"
    options: ClassVar[type] = VideoOptions
    limit: ClassVar[str] = "--video-max-pixels"
    columns: ClassVar[Mapping[str, type]] = {
        "video_seconds": float,
        "video_width": int,
        "video_height": int,
        "video_frames": int,
        "video_rate": float,
        "video_motion": float,
        "video_sound_seconds": float,
        "video_original_seconds": float,
        "video_original_width": int,
        "video_original_height": int,
        "video_original_rate": float,
    }

    def encode(self, body: bytes, options: VideoOptions, segment: Segment | None = None) -> Encoded:
        """The field ``mp4``, or the original one with ``video_keep_bytes``; ``flac`` with ``video_keep_sound``.

        Error classes: those of :func:`~pipeline.shards.video_frames.read_video_header` and of sounds; truncated,
        frame_rate, too_short, too_long, segment (it is not in the video).
        """
        from pipeline.codecs.video_encoding import encode_video

        return encode_video(body, options, segment)

    def decode(self, body: bytes) -> "Frames":
        """16 frames over the whole length, with a shorter side of 256 pixels at most."""
        from pipeline.shards.video_frames import read_frames

        return read_frames(
            body, lambda line: [line.end * (number + 0.5) / _SHOWN for number in range(_SHOWN)], size=_SHOWN_SIZE
        )

    def memory(self, options: VideoOptions) -> int:
        """The decoder's frames at ``video_max_pixels``, and the encoder's at the stored size."""
        most = options.video_max_pixels
        stored = min(most, 4 * options.video_size**2) if options.video_size else most
        return _DECODER_BYTES * most + _ENCODER_BYTES * stored + _LIBRARIES

    def seconds(self, options: VideoOptions) -> float:
        """Four seconds for each second of the longest segment, and twenty more."""
        return 20.0 + 4.0 * options.video_seconds

    def load(self) -> None:
        """FFmpeg, libsndfile and soxr."""
        import pipeline.codecs.video_encoding  # noqa: F401
        import pipeline.shards.sound_streams  # noqa: F401
