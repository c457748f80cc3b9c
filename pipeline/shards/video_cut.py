"""Cut videos: packets of a clip copied out of a long file, and times at which a shot changes."""

from collections.abc import Iterator
from io import BytesIO
from typing import Any, BinaryIO

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from pipeline.shards.pixels import use_one_thread
from pipeline.shards.video_frames import bad_video, opened, stamped, unit_of

MOST_CUT_BYTES = 256 << 20
"""Largest clip in bytes, as it is encoded in its file."""

_EARLIER = (
    0.0,
    2.0,
    10.0,
    60.0,
    float("inf"),
)  # seconds before the begin to seek, until a key frame before it is found
_SAME = 1e-6
_LATER = 1.0  # seconds of packets after the end, whose frames may be shown before it
_SHOT_SIZE = (64, 36)
_SHOT_CHANGE = 27.0
_NEIGHBOURS, _TIMES_NEIGHBOURS = 2, 2.0
# QuickTime's own container takes more codecs than MP4, Matroska takes those of Flash.
_COPIED_AS = {"mp4": "mov", "mpeg": "mov", "asf": "asf", "flv": "matroska"}

Copied = tuple[float, "Packet[Any]"]


def copy_clip(file: BinaryIO, begin: float, seconds: float) -> tuple[bytes, float]:
    """A file with the packets from ``begin`` on, ``seconds`` long, and where the clip begins in it.

    It has the video and the first sound, in a container of the same kind. Nothing is decoded: the copy begins with the
    last key frame before ``begin``. Memory is bounded by the clip. In AVI, which has no time stamps, reordered frames
    shift the clip by as many frames; so may the packets without time stamps of an MPEG program stream.

    Raises:
        SampleError: those of :func:`~pipeline.shards.video_frames.read_video_header`; segment (the file ends before
            ``begin``), too_many_bytes.
    """
    with opened(file) as (container, stream):
        origin = float((stream.start_time or 0) * unit_of(stream))
        target = BytesIO()
        kind = _COPIED_AS.get(container.format.name, container.format.name)
        with av.open(target, "w", format=kind) as copy:
            key = _copy(container, stream, copy, origin + begin, origin + begin + seconds)
        return target.getvalue(), origin + begin - key


def _copy(container: InputContainer, stream: VideoStream, copy: Any, begin: float, end: float) -> float:
    """Copy the packets; the time of the key frame, in the clock of the file."""
    sounds = container.streams.audio[:1]
    tracks: dict[int, Any] = {}
    for one in (stream, *sounds):
        try:
            tracks[one.index] = copy.add_stream_from_template(one)
        except ValueError:
            if one is stream:
                raise
    key, packets = _from_key(container, stream, list(tracks), begin)
    size = 0
    for time, packet in packets:
        is_video = packet.stream_index == stream.index
        if is_video and time >= end + _LATER:
            break
        # Frames that are shown before their key frame may refer to frames that are not copied.
        shown = _seconds(packet, packet.pts) if is_video and packet.pts is not None else time
        if shown < key - _SAME or time >= end + _LATER:
            continue
        size += packet.size
        if size > MOST_CUT_BYTES:
            bad_video("too_many_bytes", "a clip has too many bytes")
        shift = round(key / packet.time_base)
        packet.pts = None if packet.pts is None else packet.pts - shift
        packet.dts = None if packet.dts is None else packet.dts - shift
        packet.stream = tracks[packet.stream_index]
        copy.mux(packet)
    return key


def _from_key(
    container: InputContainer, stream: VideoStream, indices: list[int], begin: float
) -> tuple[float, Iterator[Copied]]:
    """The time of the last key frame up to ``begin``, and the packets from it on with their times of decoding."""
    for earlier in _EARLIER:
        at = max(0.0, begin - earlier) if earlier < float("inf") else 0.0
        container.seek(int(at / unit_of(stream)), stream=stream, backward=True)
        packets = _timed(container, indices)
        for _, packet in packets:
            if packet.stream_index != stream.index or not packet.is_keyframe:
                continue
            shown = _seconds(packet, packet.pts if packet.pts is not None else packet.dts or 0)
            if shown > begin + _SAME and at > 0:
                break
            return min(shown, begin), _chained(packet, packets)
    bad_video("segment", "the segment is not in the video")


def _chained(first: "Packet[Any]", others: Iterator[Copied]) -> Iterator[Copied]:
    yield _seconds(first, first.pts if first.pts is not None else first.dts or 0), first
    yield from others


def _timed(container: InputContainer, indices: list[int]) -> Iterator[Copied]:
    for packet in container.demux(*(container.streams[index] for index in indices)):
        stamp = packet.dts if packet.dts is not None else packet.pts
        if packet.size and stamp is not None:
            yield _seconds(packet, stamp), packet


def _seconds(packet: "Packet[Any]", stamp: int) -> float:
    return float(stamp * packet.time_base)


def shot_changes(file: BinaryIO) -> tuple[list[float], float]:
    """Times in seconds at which another shot begins, and the end of the last frame.

    As the content detector of PySceneDetect does, frames are compared by their mean difference in hue, saturation and
    value, each from 0 to 255, at 64 x 36 pixels. A shot changes where it is at least 27, and twice that of the two
    frames before and after, so that fast motion and flashes of a camera are none.

    Raises:
        SampleError: as :func:`~pipeline.shards.video_frames.read_video_header`.
    """
    use_one_thread()
    times, scores = [], []
    scaler = VideoReformatter()
    before: NDArray[np.int16] | None = None
    with opened(file) as (container, stream):
        unit = unit_of(stream)
        length = 0.0
        for stamp, frame in stamped(container, stream):
            small = scaler.reformat(frame, *_SHOT_SIZE, "rgb24", interpolation="AREA", threads=1).to_ndarray()
            colours = cv2.cvtColor(small, cv2.COLOR_RGB2HSV_FULL).astype(np.int16)
            times.append(float(stamp * unit))
            scores.append(0.0 if before is None else _difference(colours, before))
            length = float((frame.duration or 0) * unit) or length
            before = colours
    if not times:
        bad_video("no_picture", "no frame can be decoded")
    found = [times[place] - times[0] for place in range(1, len(scores)) if _is_change(scores, place)]
    return found, times[-1] - times[0] + length


def _difference(first: NDArray[np.int16], second: NDArray[np.int16]) -> float:
    apart = np.abs(first - second)
    # Hue is an angle.
    apart[:, :, 0] = np.minimum(apart[:, :, 0], 256 - apart[:, :, 0])
    return float(apart.mean())


def _is_change(scores: list[float], place: int) -> bool:
    if scores[place] < _SHOT_CHANGE:
        return False
    near = [*scores[max(1, place - _NEIGHBOURS) : place], *scores[place + 1 : place + 1 + _NEIGHBOURS]]
    return not near or scores[place] >= _TIMES_NEIGHBOURS * max(near)
