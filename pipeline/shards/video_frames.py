"""Frames of encoded videos at wanted times, decoded by FFmpeg's libraries inside the wheel of PyAV.

1. The kind is detected from the first bytes, never from a name. FFmpeg is given the name of the format: its own
   detection would also accept playlists, which open further files.
2. :func:`read_frames` reads the time stamps of all packets, which needs no decoding. So the frame that is shown at a
   time is known exactly, also with a variable rate, reordered frames or an odd first time stamp. Nothing in a header
   about the number of frames or the length is used.
3. Each wanted frame is decoded from the last key frame before it on. Frames between them that no other frame refers
   to are left out.
4. All frames are decoded, twice, where a packet has no time stamp (AVI has none), two have the same one, or a frame
   does not come out of the decoder.

Times are seconds from the first shown frame. All functions are pure and thread-safe.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import chain
from typing import BinaryIO, NamedTuple, NoReturn

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from pipeline.errors import SampleError
from pipeline.shards.pixels import MAX_PIXELS, Pixels
from pipeline.shards.sound_kinds import kind_of
from pipeline.shards.video_pixels import frame_size, scaled_size, shown_pixels

VIDEO_KINDS = ("mp4", "matroska", "avi", "mpeg", "asf", "flv")
"""Kinds of files that may have frames; FFmpeg's formats have the same names."""

_SAME = 1e-6  # seconds by which a wanted time may be before a time stamp because of rounding
_USUAL_RATE = Fraction(25)
_UNPACKED = 8  # bytes of all packets for a byte of the file, at most; Matroska may compress them


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What the header of a video claims. ``width`` and ``height`` are those of its first frame as it is shown.

    ``seconds``, ``frames`` and ``frame_rate`` (the average, per second) are None where the header says nothing.
    """

    kind: str
    seconds: float | None
    frames: int | None
    frame_rate: float | None
    width: int
    height: int
    has_sound: bool


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the frames of a video are shown: the first one at ``begin`` = 0, the last one until ``end``, in seconds.

    ``stamps`` are the times from which each of the ``frames`` is shown; empty for frames at equal distances.
    """

    begin: float
    end: float
    frames: int
    stamps: Sequence[float] = ()


class Frames(NamedTuple):
    """Frames in the order of the wanted times: uint8 [T, H, W, 3], and their own time stamps, float32 [T]."""

    pixels: Pixels
    times: npt.NDArray[np.float32]


WantedTimes = Sequence[float] | Callable[[Timeline], Sequence[float]]


def read_video_header(video: bytes | BinaryIO) -> VideoHeader:
    """The header of a video; only its first frame is decoded, which knows how the video is turned.

    Raises:
        SampleError: error classes empty, not_a_video, no_picture (no frames), too_many_pixels, damaged.
    """
    with opened(video) as (container, stream):
        frame = next(decoded(container, stream), None)
        if frame is None:
            bad_video("no_picture", "no frame can be decoded")
        return header_of(container, stream, frame)


def header_of(container: InputContainer, stream: VideoStream, frame: av.VideoFrame) -> VideoHeader:
    """The header of an open video with its first frame."""
    if stream.duration is not None and stream.time_base is not None:
        seconds: float | None = float(stream.duration * stream.time_base)
    else:
        seconds = None if container.duration is None else container.duration / av.time_base
    width, height = frame_size(frame, stream.codec_context.sample_aspect_ratio)
    return VideoHeader(
        kind=container.format.name,
        seconds=seconds if seconds and seconds > 0 else None,
        frames=stream.frames if stream.frames > 0 else None,
        frame_rate=float(stream.average_rate) if stream.average_rate else None,
        width=width,
        height=height,
        has_sound=bool(container.streams.audio),
    )


def read_timeline(body: bytes) -> Timeline:
    """When the frames of a video are shown, from the time stamps of its packets.

    Raises:
        SampleError: as :func:`read_video_header`.
    """
    with opened(body) as (container, stream):
        packets = _all_packets(container, stream, len(body))
        return (_packet_clock(packets, stream) or _frame_clock(container, stream)).timeline


def read_frames(body: bytes, times: WantedTimes, *, size: int | None = None) -> Frames:
    """The frame that is shown at each time, as it is displayed: the last one with a time stamp that is not later.

    Before the first frame that is the first one, after the end the last one. ``times`` are seconds in any order, or a
    function of the timeline that gives them; it may be called twice. With ``size`` the shorter side of the frames is
    at most that many pixels, and the decoder scales them. All frames have the size of the first one.

    Raises:
        SampleError: as :func:`read_video_header`.
        ValueError: no time is wanted.
    """
    with opened(body) as (container, stream):
        packets = _all_packets(container, stream, len(body))
        clock = _packet_clock(packets, stream)
        if clock is not None:
            picked = clock.pick(times)
            found = _decode_ranges(stream, packets, clock, picked, size)
            if found is not None:
                return _stacked(found, clock, picked)
        clock = _frame_clock(container, stream)
        picked = clock.pick(times)
        return _stacked(_decode_all(container, stream, set(picked), size), clock, picked)


def read_length(file: BinaryIO) -> float | None:
    """Length in seconds that the header of a video claims; None where it says nothing.

    Raises:
        SampleError: as :func:`read_video_header`.
    """
    with opened(file) as (container, _):
        return None if container.duration is None else container.duration / av.time_base


def read_frame(file: BinaryIO, at: float) -> Pixels:
    """The frame of a long file that is shown ``at`` seconds, or the last one: uint8 [H, W, 3], red-green-blue.

    The file is not read whole: FFmpeg seeks the key frame, and one frame at a time is decoded from there on.

    Raises:
        SampleError: as :func:`read_video_header`.
    """
    with opened(file) as (container, stream):
        origin = (container.start_time or 0) / av.time_base
        if at > 0 and stream.time_base:
            container.seek(int((origin + at) / stream.time_base), stream=stream)
        shown = None
        for frame in decoded(container, stream):
            if shown is not None and (frame.time or 0.0) - origin > at + _SAME:
                break
            shown = frame
        if shown is None:
            bad_video("no_picture", "no frame at that time")
        ratio = stream.codec_context.sample_aspect_ratio
        return shown_pixels(shown, frame_size(shown, ratio))


def bad_video(error_class: str, message: str) -> NoReturn:
    """Raise the error of a bad video; messages are few and fixed, for counting."""
    raise SampleError("failed_to_resize", error_class, f"Video decoding error: {message}")


@contextmanager
def opened(video: bytes | BinaryIO, most_pixels: int = MAX_PIXELS) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream, cover images aside; one thread decodes.

    Raises:
        SampleError: as :func:`read_video_header`; also where FFmpeg raises an error inside the context.
    """
    file = BytesIO(video) if isinstance(video, bytes) else video
    kind = video_kind(file)
    try:
        container = av.open(file, mode="r", format=kind)
    except (av.FFmpegError, ValueError):
        bad_video("damaged", "damaged")
    with container:
        stream = _video_stream(container)
        if stream.codec_context.width * stream.codec_context.height > most_pixels:
            bad_video("too_many_pixels", "more pixels than allowed")
        stream.codec_context.thread_count = 1
        try:
            yield container, stream
        except av.FFmpegError:
            bad_video("damaged", "damaged")


def video_kind(file: BinaryIO) -> str:
    """The kind of a file, one of ``VIDEO_KINDS``; the file is then at its start.

    Raises:
        SampleError: error classes empty, not_a_video.
    """
    file.seek(0)
    start = file.read(16)
    file.seek(0)
    if not start:
        bad_video("empty", "empty body")
    kind = kind_of(start)
    return kind if kind in VIDEO_KINDS else bad_video("not_a_video", "not a video of a known kind")


def decoded(container: InputContainer, stream: VideoStream, strict: bool = False) -> Iterator[av.VideoFrame]:
    """The frames from the present position on; a packet that cannot be decoded is left out.

    Raises:
        SampleError: error class damaged, where no packet could be decoded; with ``strict`` already where one could not
            after the first frame, other than the last one of a file that ends in it.
    """
    failed = given = 0
    for packet in chain(_packets(container, stream), [None]):
        if strict and packet is not None and packet.is_corrupt:
            continue  # the file ends in it
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError:
            failed += 1
            if strict and given:
                break
            continue
        given += len(frames)
        yield from frames
    if failed and (strict or not given):
        bad_video("damaged", "damaged")


def stamped(
    container: InputContainer, stream: VideoStream, strict: bool = False
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames from the present position on with growing time stamps in the units of the stream.

    A frame without a time stamp, or with an earlier one than the frame before it, follows that one by the mean rate.
    """
    unit = unit_of(stream)
    step = max(1, round(1 / ((stream.average_rate or _USUAL_RATE) * unit)))
    in_order = container.format.name == "avi"
    last: int | None = None
    for frame in decoded(container, stream, strict):
        stamp = frame.dts if in_order else frame.pts
        if stamp is None or (last is not None and stamp < last):
            stamp = 0 if last is None else last + step
        last = stamp
        yield stamp, frame


def unit_of(stream: VideoStream) -> Fraction:
    """Seconds of one step of the stream's time stamps."""
    return stream.time_base or Fraction(1, av.time_base)


def _video_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                bad_video("unknown_codec", "no decoder for its codec")
            return stream
    bad_video("no_picture", "the file has no frames")


@dataclass(frozen=True, slots=True)
class _Clock:
    """Time stamps in the order of display, as seconds and in the units of the stream."""

    seconds: list[float]
    stamps: list[int]
    timeline: Timeline

    def pick(self, times: WantedTimes) -> list[int]:
        """The numbers of the frames that are shown at the times."""
        wanted = times(self.timeline) if callable(times) else times
        if not len(wanted):
            raise ValueError("no time is wanted")
        return [max(0, bisect_right(self.seconds, time + _SAME) - 1) for time in wanted]


def _packets(container: InputContainer, stream: VideoStream) -> Iterator["Packet[VideoStream]"]:
    """The packets with content: AVI has empty ones for frames that are shown longer, and the last one is a mark."""
    return (packet for packet in container.demux(stream) if packet.size)


def _all_packets(container: InputContainer, stream: VideoStream, size: int) -> list["Packet[VideoStream]"]:
    """All packets of a file of ``size`` bytes, at once in memory.

    Raises:
        SampleError: error class damaged, where an index gives the same bytes to many frames.
    """
    found, left = [], _UNPACKED * size
    for packet in _packets(container, stream):
        left -= packet.size
        if left < 0:
            bad_video("damaged", "damaged")
        found.append(packet)
    return found


def _packet_clock(packets: Sequence["Packet[VideoStream]"], stream: VideoStream) -> _Clock | None:
    """The clock by the packets; None where they do not tell which frame is shown when.

    AVI has no time stamps: its packets are numbered in the order of decoding.
    """
    if stream.container.format.name == "avi" and not all(packet.is_keyframe for packet in packets):
        return None
    shown = [packet for packet in packets if not packet.is_discard]
    stamps = [packet.pts for packet in shown if packet.pts is not None]
    if not stamps or len(stamps) < len(shown) or len(set(stamps)) < len(stamps):
        return None
    last = max(shown, key=lambda packet: packet.pts or 0)
    return _clock(sorted(stamps), stream, last.duration)


def _frame_clock(container: InputContainer, stream: VideoStream) -> _Clock:
    """The clock by the frames that come out of the decoder; a frame without a time stamp follows by the mean rate."""
    return _clock([stamp for stamp, _ in _stamped(container, stream)], stream, None)


def _clock(stamps: list[int], stream: VideoStream, last: int | None) -> _Clock:
    if not stamps:
        bad_video("no_picture", "no frame can be decoded")
    unit = unit_of(stream)
    seconds = [float((stamp - stamps[0]) * unit) for stamp in stamps]
    timeline = Timeline(0.0, seconds[-1] + _rest(seconds, stream, last), len(seconds), seconds)
    return _Clock(seconds, stamps, timeline)


def _rest(seconds: Sequence[float], stream: VideoStream, last: int | None) -> float:
    """How long the last frame is shown. ``last`` is the duration of its packet.

    With reordered frames, MP4 states the durations of packets in the order of decoding. The length of the whole stream
    is right then; it is believed where the last frame is not shown for longer than the longest of the others.
    """
    unit = unit_of(stream)
    gaps = np.diff(seconds)
    if len(gaps) and stream.duration is not None and stream.codec_context.has_b_frames:
        rest = float(stream.duration * unit) - seconds[-1]
        if _SAME < rest <= gaps.max() + _SAME:
            return rest
    if last:
        return float(last * unit)
    return float(np.median(gaps)) if len(gaps) else float(1 / (stream.average_rate or _USUAL_RATE))


def _decode_ranges(
    stream: VideoStream,
    packets: Sequence["Packet[VideoStream]"],
    clock: _Clock,
    picked: Sequence[int],
    size: int | None,
) -> dict[int, Pixels] | None:
    """The pixels of the wanted frames by their numbers; None where one of them does not come out of the decoder."""
    wanted = {clock.stamps[number]: number for number in picked}
    shape = _Shape(stream, size)
    found: dict[int, Pixels] = {}
    context = stream.codec_context
    for first, last in _ranges(packets, wanted):
        context.flush_buffers()
        for packet in [*packets[first : last + 1], None]:
            # What no other frame refers to is only decoded where it is wanted.
            keep = packet is None or packet.pts in wanted
            context.skip_frame = "DEFAULT" if keep else "NONREF"
            try:
                frames = context.decode(packet)
            except av.FFmpegError:
                return None
            for frame in frames:
                if frame.pts in wanted:
                    found.setdefault(wanted[frame.pts], shape.pixels(frame))
    context.flush_buffers()
    context.skip_frame = "DEFAULT"
    return found if len(found) == len(wanted) else None


def _ranges(packets: Sequence["Packet[VideoStream]"], wanted: dict[int, int]) -> list[tuple[int, int]]:
    """First and last packet of each run that has to be decoded, in order and apart from one another."""
    ranges: list[tuple[int, int]] = []
    keys: list[tuple[int, int]] = []
    for place, packet in enumerate(packets):
        stamp = packet.pts or 0
        if packet.is_keyframe:
            keys.append((place, stamp))
        if packet.is_discard or stamp not in wanted:
            continue
        # Frames that are shown before the key frame they follow may refer to frames before it.
        first = next((key for key, shown in reversed(keys) if shown <= stamp), 0)
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = (min(first, ranges[-1][0]), place)
        else:
            ranges.append((first, place))
    return ranges


def _decode_all(
    container: InputContainer, stream: VideoStream, wanted: set[int], size: int | None
) -> dict[int, Pixels]:
    shape = _Shape(stream, size)
    found = {}
    for number, (_, frame) in enumerate(_stamped(container, stream)):
        if number in wanted:
            found[number] = shape.pixels(frame)
            if len(found) == len(wanted):
                break
    return found


def _stamped(container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, av.VideoFrame]]:
    """All frames from the first one on with their time stamps."""
    container.seek(0, backward=True, any_frame=False)
    stream.codec_context.skip_frame = "DEFAULT"
    return stamped(container, stream)


class _Shape:
    """The size of the first frame that is wanted; later ones are scaled to it."""

    def __init__(self, stream: VideoStream, shorter: int | None) -> None:
        self._ratio = stream.codec_context.sample_aspect_ratio
        self._shorter = shorter
        self._size: tuple[int, int] | None = None
        self._scaler = VideoReformatter()

    def pixels(self, frame: av.VideoFrame) -> Pixels:
        """uint8 [H, W, 3] of a frame."""
        if frame.width * frame.height > MAX_PIXELS:
            bad_video("too_many_pixels", "more pixels than allowed")
        self._size = self._size or scaled_size(*frame_size(frame, self._ratio), self._shorter)
        return shown_pixels(frame, self._size, self._scaler)


def _stacked(found: dict[int, Pixels], clock: _Clock, picked: Sequence[int]) -> Frames:
    times = np.array([clock.seconds[number] for number in picked], np.float32)
    return Frames(np.stack([found[number] for number in picked]), times)
