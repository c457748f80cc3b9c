"""What FFmpeg decodes (MP3, AAC, MP4, Matroska, WebM, AVI), for :mod:`pipeline.shards.waveforms`."""

from collections.abc import Iterator
from typing import BinaryIO

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer

from pipeline.shards.sound_kinds import Samples, SoundHeader, bad_sound

_PREROLL = 0.2  # seconds: lossy codecs need the frames before the first wanted one
_UNINDEXED = ("mp3", "aac")  # kinds in which FFmpeg seeks by the mean bit rate: they are read from their start
_FULL_SCALE = {"u8": 128.0, "s16": 32_768.0, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


def read_stream_header(file: BinaryIO, kind: str) -> SoundHeader:
    """The header of the first sound stream; raises ``SampleError`` (damaged, no_sound)."""
    with _opened(file, kind) as container:
        return _header(kind, container, _sound_stream(container))


def stream_blocks(file: BinaryIO, kind: str, start: float, seconds: float) -> tuple[SoundHeader, Iterator[Samples]]:
    """The header, and the samples of a segment as blocks float32 [n, C]; raises as :func:`read_stream_header`."""
    container = _opened(file, kind)
    try:
        header = _header(kind, container, _sound_stream(container))
    except BaseException:
        container.close()
        raise
    return header, _blocks(container, header, start, seconds)


def _opened(file: BinaryIO, kind: str) -> InputContainer:
    try:
        return av.open(file, mode="r", format=kind)
    except (av.FFmpegError, ValueError):
        bad_sound("damaged", "damaged")


def _sound_stream(container: InputContainer) -> AudioStream:
    if not container.streams.audio:
        bad_sound("no_sound", "the file has no sound")
    return container.streams.audio[0]


def _header(kind: str, container: InputContainer, stream: AudioStream) -> SoundHeader:
    context = stream.codec_context
    if stream.duration is not None and stream.time_base is not None:
        length: float | None = float(stream.duration * stream.time_base)
    else:
        length = None if container.duration is None else container.duration / av.time_base
    # Only MP4 states the length of the stream itself.
    return SoundHeader(kind, context.sample_rate, context.channels, length, exact=kind == "mp4")


def _blocks(container: InputContainer, header: SoundHeader, start: float, seconds: float) -> Iterator[Samples]:
    first = round(start * header.sample_rate)
    end = first + round(seconds * header.sample_rate)
    with container:
        stream = _sound_stream(container)
        try:
            position = None
            origin = (container.start_time or 0) / av.time_base
            for frame in _frames(container, stream, origin + start if header.kind not in _UNINDEXED else 0.0):
                if (frame.sample_rate, frame.layout.nb_channels) != (header.sample_rate, header.channels):
                    bad_sound("damaged", "rate or channels change")
                if position is None:
                    position = round(((frame.time or origin) - origin) * header.sample_rate)
                block = _frame_samples(frame)[max(0, first - position) : max(0, end - position)]
                position += frame.samples
                if len(block):
                    yield block
                if position >= end:
                    return
        except (av.FFmpegError, ValueError):
            bad_sound("damaged", "damaged")


def _frames(container: InputContainer, stream: AudioStream, start: float) -> Iterator[AudioFrame]:
    """Decoded frames from ``start`` seconds or somewhat earlier."""
    before = start - _PREROLL
    if before > 0 and stream.time_base:
        container.seek(int(before / stream.time_base), stream=stream)
    yield from container.decode(stream)


def _frame_samples(frame: AudioFrame) -> Samples:
    """float32 [n, C] of a decoded frame, planar or interleaved."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    name = frame.format.name.removesuffix("p")
    floats = values.astype(np.float32) / np.float32(_FULL_SCALE[name])
    return floats - 1 if name == "u8" else floats
