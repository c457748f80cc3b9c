"""Single frames of encoded videos, decoded by FFmpeg's libraries inside the wheel of PyAV."""

from typing import BinaryIO, NoReturn

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from pipeline.errors import SampleError
from pipeline.shards.pixels import MOST_PIXELS, Pixels
from pipeline.shards.sound_kinds import file_kind

VIDEO_KINDS = ("mp4", "matroska", "avi")
"""Kinds of files that may have frames; FFmpeg's formats have the same names."""


def read_length(file: BinaryIO) -> float | None:
    """Length in seconds that the header of a video states; None where it does not.

    Raises:
        SampleError: error classes empty, not_a_video, damaged.
    """
    with _opened(file) as container:
        return None if container.duration is None else container.duration / av.time_base


def read_frame(file: BinaryIO, at: float) -> Pixels:
    """The frame that is shown ``at`` seconds, or the last one before the end: uint8 [H, W, 3], red-green-blue.

    Frames between the nearest key frame and the wanted one are decoded one at a time.

    Raises:
        SampleError: error classes empty, not_a_video, damaged, no_picture (no frame), too_many_pixels.
    """
    with _opened(file) as container:
        if not container.streams.video:
            bad_video("no_picture", "the file has no frames")
        stream = container.streams.video[0]
        if stream.codec_context.width * stream.codec_context.height > MOST_PIXELS:
            bad_video("too_many_pixels", "more than 2^30 pixels")
        try:
            return _frame(container, stream, at)
        except (av.FFmpegError, ValueError):
            bad_video("damaged", "damaged")


def bad_video(error_class: str, message: str) -> NoReturn:
    """Raise the error of a bad video; messages are few and fixed, for counting."""
    raise SampleError("failed_to_resize", error_class, f"Video decoding error: {message}")


def _opened(file: BinaryIO) -> InputContainer:
    kind = file_kind(file)
    if kind not in VIDEO_KINDS:
        bad_video("not_a_video", "not a video of a known kind")
    try:
        return av.open(file, mode="r", format=kind)
    except (av.FFmpegError, ValueError):
        bad_video("damaged", "damaged")


def _frame(container: InputContainer, stream: VideoStream, at: float) -> Pixels:
    origin = (container.start_time or 0) / av.time_base
    if at > 0 and stream.time_base:
        container.seek(int((origin + at) / stream.time_base), stream=stream)
    shown = None
    for frame in container.decode(stream):
        if shown is not None and (frame.time or 0.0) - origin > at + 1e-6:
            break
        shown = frame
    if shown is None:
        bad_video("no_picture", "no frame at that time")
    return np.asarray(shown.to_ndarray(format="rgb24"), np.uint8)
