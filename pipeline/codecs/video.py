"""The codec of videos: a segment is decoded, scaled and stored as MP4 with H.264; its sound may be kept as FLAC."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.codecs.codec import Codec, Encoded
from pipeline.codecs.video_options import VideoOptions as VideoOptions
from pipeline.shards.segments import Segment
from pipeline.sources.source import TimedCaption

if TYPE_CHECKING:
    from pipeline.shards.video_frames import Frames

_SHOWN = 16  # frames that decode() gives
_SHOWN_SIZE = 256
# 17 frames of reference and those under way, with 16 bits and chroma of half the width and height.
_DECODER_BYTES = 64
# 60 frames of libx264's look-ahead and references, and the frame in RGB with 16 bits and as floats.
_ENCODER_BYTES = 160
_LIBRARIES = 512 << 20


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
        "video_begin": float,
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
        ``video_begin`` is where the stored clip begins in the segment.
        """
        from pipeline.codecs.video_encoding import encode_video

        return encode_video(body, options, segment)

    def decode(self, body: bytes) -> "Frames":
        """16 frames over the whole length, with a shorter side of 256 pixels at most."""
        from pipeline.shards.video_frames import read_frames

        return read_frames(
            body, lambda line: [line.end * (number + 0.5) / _SHOWN for number in range(_SHOWN)], size=_SHOWN_SIZE
        )

    def fitted_columns(self, columns: Mapping[str, Any], part: Encoded) -> Mapping[str, Any]:
        """``timed_captions`` in seconds of the stored clip; error class captions, where none of them is in it."""
        from pipeline.shards.video_frames import bad_video

        timed = columns.get("timed_captions")
        begin, seconds = part.columns["video_begin"], part.columns["video_seconds"]
        if not timed or not isinstance(begin, float) or not isinstance(seconds, float):
            return {}
        moved = [(one["start"] - begin, one["end"] - begin, one["text"]) for one in timed]
        kept = [
            TimedCaption(start=max(0.0, start), end=min(end, seconds), text=text)
            for start, end, text in moved
            if start < seconds and end > 0
        ]
        if not kept:
            bad_video("captions", "no timed caption is in the stored clip")
        return {"timed_captions": kept}

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
