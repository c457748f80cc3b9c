"""Decode a segment of a video and encode it again, frame by frame: memory does not depend on the segment's length."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from pipeline.codecs.codec import Encoded
from pipeline.codecs.video_options import MOST_RATE, VideoOptions
from pipeline.errors import SampleError
from pipeline.shards.media import VIDEO
from pipeline.shards.segments import Segment
from pipeline.shards.video_frames import bad_video, header_of, opened, stamped, unit_of
from pipeline.shards.video_pixels import HIGH_RANGE, SCALING, orientation, scaled_size, shown_pixels
from pipeline.shards.video_writer import Mp4Writer
from pipeline.sources.source import Scalar

_SLACK = 0.5  # seconds by which a video may be shorter than its header says
_SAME = 1e-6
_EARLIER = (0.0, 2.0, 10.0, 60.0)  # seconds before the begin to seek, until a frame before it is found
_MOTION_STEP = 0.25
_MOTION_SIZE = 32
_BT601 = 6


@dataclass(frozen=True, slots=True)
class Shown:
    """A frame, and from when to when it is shown, in seconds of the segment."""

    begin: float
    end: float
    frame: av.VideoFrame


def encode_video(body: bytes, options: VideoOptions, segment: Segment | None) -> Encoded:
    """See :meth:`pipeline.codecs.video.VideoCodec.encode`."""
    with opened(body, options.video_max_pixels) as (container, stream):
        clip = _ClipEncoder(container, stream, options, segment)
        content, columns = clip.encode()
        kept = {clip.ending(body): body} if clip.unchanged and options.video_keep_bytes else {"mp4": content}
        begin, end = clip.sound
    sound, seconds = _sound(body, begin, end - begin, options) if options.video_keep_sound else ({}, None)
    return Encoded({**kept, **sound}, {**columns, "video_sound_seconds": seconds})


class _ClipEncoder:
    """One segment on its way from the decoder to the encoder."""

    def __init__(
        self, container: InputContainer, stream: VideoStream, options: VideoOptions, segment: Segment | None
    ) -> None:
        self._container, self._stream, self._options = container, stream, options
        self._unit = unit_of(stream)
        frames = stamped(container, stream, strict=True)
        first = next(frames, None)
        if first is None:
            bad_video("no_picture", "no frame can be decoded")
        self._check_pixels(first[1])
        self._origin = first[0]
        self._first = first
        self._frames = chain([first], frames)
        self.header = header_of(container, stream, first[1])
        if self.header.seconds is not None and self.header.seconds > options.video_max_seconds:
            bad_video("too_long", "longer than --video-max-seconds")
        self._begin, self._end = self._bounds(segment)
        self._cut = self._begin - (segment[0] if segment else 0.0)
        self._scaled = scaled_size(self.header.width, self.header.height, options.video_size or None)
        # H.264 with chroma of half the size needs even sides.
        self._size = _even(self._scaled[0]), _even(self._scaled[1])
        self._whole = segment is None
        self._scaler, self._shower = VideoReformatter(), VideoReformatter()
        self._motion = _Motion()

    @property
    def sound(self) -> tuple[float, float]:
        """Begin and end of the segment, in seconds from the begin of the file."""
        start = (self._container.start_time or 0) / av.time_base
        before = float(self._origin * self._unit) - start
        return max(0.0, self._begin + before), self._end + before

    @property
    def unchanged(self) -> bool:
        """Whether nothing was cut, scaled or left out."""
        same = self._scaled == (self.header.width, self.header.height)
        return self._whole and same and not self._options.video_frames_per_second

    def ending(self, body: bytes) -> str:
        """The ending of the body's own format."""
        kind = self.header.kind
        return VIDEO.kinds["webm" if kind == "matroska" and b"webm" in body[:64] else kind][0]

    def encode(self) -> tuple[bytes, dict[str, Scalar]]:
        """The segment as MP4, and its columns."""
        options = self._options
        rate = options.video_frames_per_second or self.header.frame_rate or 25.0
        writer = Mp4Writer(self._size, crf=options.video_quality, key_seconds=options.video_key_seconds, rate=rate)
        length = 0.0
        for number, shown in enumerate(self._at_rate(self._spans())):
            frame, direct = self._converted(shown.frame)
            if not number:
                # The matrix of the source is kept; what is converted from RGB has that of BT.601.
                names = ("colorspace", "color_primaries", "color_trc")
                plain = {"colorspace": _BT601, "color_primaries": 2, "color_trc": 2}
                writer.colours({name: getattr(shown.frame, name) for name in names} if direct else plain)
            self._motion.see(frame, shown.begin)
            writer.add(frame, shown.begin, shown.end)
            length = shown.end
        if not writer.frames:
            bad_video("segment", "the segment is not in the video")
        if length < options.video_min_seconds:
            bad_video("too_short", "shorter than --video-min-seconds")
        content = writer.finish()
        return content, self._columns(length, writer.frames)

    def _columns(self, length: float, frames: int) -> dict[str, Scalar]:
        header, whole = self.header, self._whole
        return {
            "video_seconds": length,
            "video_width": self._size[0],
            "video_height": self._size[1],
            "video_frames": frames,
            "video_rate": self._options.video_frames_per_second or frames / length,
            "video_begin": self._cut,
            "video_motion": self._motion.mean,
            "video_original_seconds": length if whole else header.seconds,
            "video_original_width": header.width,
            "video_original_height": header.height,
            "video_original_rate": header.frame_rate,
        }

    def _bounds(self, segment: Segment | None) -> tuple[float, float]:
        begin, end = segment or (0.0, math.inf)
        longest = self._options.video_seconds
        spare = max(0.0, min(end, self.header.seconds or 0.0) - begin - longest)
        start = begin + (spare / 2 if self._options.video_segment == "middle" else 0.0)
        return start, min(start + longest, end)

    def _check_pixels(self, frame: av.VideoFrame) -> None:
        if frame.width * frame.height > self._options.video_max_pixels:
            bad_video("too_many_pixels", "more pixels than --video-max-pixels")

    def _seconds(self, stamp: int) -> float:
        return float((stamp - self._origin) * self._unit)

    def _from_begin(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """The frames from one at or before the begin on."""
        reordered = self.header.kind == "avi" and self._stream.codec_context.has_b_frames
        if self._begin <= 1.0 or reordered:  # AVI has no time stamps: only its start is known
            return self._frames
        for earlier in _EARLIER:
            if self._begin - earlier <= 0:
                break
            self._container.seek(
                self._origin + int((self._begin - earlier) / self._unit), stream=self._stream, backward=True
            )
            frames = stamped(self._container, self._stream, strict=True)
            first = next(frames, None)
            if first is not None and self._seconds(first[0]) <= self._begin + _SAME:
                return chain([first], frames)
        self._container.seek(0, backward=True)
        return stamped(self._container, self._stream, strict=True)

    def _spans(self) -> Iterator[Shown]:
        """The frames of the segment. Those that no time is left for, because of equal time stamps, are left out."""
        begin, end = self._begin, self._end
        last: tuple[float, av.VideoFrame] | None = None
        gap, hidden, shown = 0.0, 0, 0
        for stamp, frame in self._from_begin():
            self._check_pixels(frame)
            seconds = self._seconds(stamp)
            if frame.is_corrupt and seconds >= begin:
                bad_video("damaged", "damaged")
            if last is not None:
                gap = seconds - last[0] or gap
                if seconds <= last[0]:
                    hidden += 1
                elif seconds > begin + _SAME:
                    shown += 1
                    yield Shown(max(last[0] - begin, 0.0), min(seconds, end) - begin, last[1])
                self._check_rate(shown, hidden, seconds - begin)
            if seconds >= end - _SAME:
                self._whole = False
                return
            last = seconds, frame
        if last is None:
            return
        length = float((last[1].duration or 0) * self._unit) or gap or 1 / (self.header.frame_rate or 25.0)
        stop = min(last[0] + length, end)
        self._whole = self._whole and self._begin == 0
        if stop > begin + _SAME:
            yield Shown(max(last[0] - begin, 0.0), stop - begin, last[1])
        self._check_end(last[0] + length)

    def _check_rate(self, shown: int, hidden: int, seconds: float) -> None:
        if hidden > 16 + shown or shown > MOST_RATE * max(seconds, 0.0) + 16:
            bad_video("frame_rate", f"no, or more than {MOST_RATE:g}, frames per second")

    def _check_end(self, end: float) -> None:
        """Raise where the stream's own header claims more of the segment than there is."""
        # Matroska claims one length for all streams.
        claimed = self.header.seconds if self._stream.duration is not None or not self.header.has_sound else None
        if claimed is not None and end < min(claimed, self._end) - _SLACK:
            bad_video("truncated", "the video ends before its header says")

    def _at_rate(self, spans: Iterator[Shown]) -> Iterator[Shown]:
        """The frames that are shown at multiples of ``1 / video_frames_per_second``."""
        rate = self._options.video_frames_per_second
        if not rate:
            yield from spans
            return
        number, end = 0, 0.0
        last: Shown | None = None
        for shown in spans:
            end = shown.end
            while number / rate < end - _SAME:
                if number / rate >= shown.begin - _SAME:
                    if last is not None:
                        yield last
                    last = Shown(number / rate, (number + 1) / rate, shown.frame)
                number += 1
        if last is not None:  # the clip is not longer than the segment
            yield Shown(last.begin, min(last.end, end), last.frame)

    def _converted(self, frame: av.VideoFrame) -> tuple[av.VideoFrame, bool]:
        """The frame as yuv420p of the stored size, and whether its colours needed no RGB."""
        has_alpha = any(component.is_alpha for component in frame.format.components)
        direct = not (has_alpha or frame.format.is_rgb or frame.color_trc in HIGH_RANGE or any(orientation(frame)))
        if not direct:
            pixels = shown_pixels(frame, self._size, self._shower)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        made = self._scaler.reformat(
            frame,
            *self._size,
            "yuv420p",
            dst_colorspace=None if direct else Colorspace.ITU601,
            interpolation=SCALING,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        return made, direct


class _Motion:
    """Mean difference of frames a quarter of a second apart, as grey images of 32 x 32; 0 to 1."""

    def __init__(self) -> None:
        self._scaler = VideoReformatter()
        self._last: tuple[float, NDArray[np.float32]] | None = None
        self._sum, self._count = 0.0, 0

    def see(self, frame: av.VideoFrame, time: float) -> None:
        """Compare the frame at ``time`` seconds, if it is time."""
        if self._last is not None and time < self._last[0] + _MOTION_STEP - _SAME:
            return
        small = self._scaler.reformat(frame, _MOTION_SIZE, _MOTION_SIZE, "gray", interpolation=SCALING, threads=1)
        grey = np.asarray(small.to_ndarray(), np.float32)
        if self._last is not None:
            self._sum += float(np.abs(grey - self._last[1]).mean()) / 255
            self._count += 1
        self._last = time, grey

    @property
    def mean(self) -> float:
        """0 for a single frame."""
        return self._sum / self._count if self._count else 0.0


def _even(side: int) -> int:
    return max(2, side // 2 * 2)


def _sound(body: bytes, begin: float, seconds: float, options: VideoOptions) -> tuple[dict[str, bytes], float | None]:
    """The field ``flac`` and its length; nothing for a video without sound, or whose sound ends before the segment."""
    from pipeline.shards.waveforms import encode_flac, read_waveform

    rate = options.video_sound_rate or None
    try:
        sound = read_waveform(body, start=begin, seconds=seconds, sample_rate=rate, stereo=True)
    except SampleError as error:
        if error.error_class in ("no_sound", "empty"):
            return {}, None
        raise
    return {"flac": encode_flac(sound.samples, sound.sample_rate)}, sound.seconds
